// What dispatch.cpp knows about the kernels that each instruction set brings.
#pragma once

#include <cstdint>

// Rows to quantise: contiguous blocks of values in, contiguous blocks of bytes out.
struct Rows {
    const void* values;
    int type;              // of the values: 0 float32, 1 float16, 2 bfloat16
    const float* weights;  // of a row's columns; null: all 1
    int64_t blocks;        // in a row
    uint8_t* bytes;
};

struct Kernel {
    int id;  // of the format in a GGUF file
    int block_size;
    int block_bytes;
    // Blocks first to last; returns the first that holds a value that is not finite, or -1.
    int64_t (*encode)(const Rows& rows, int64_t first, int64_t last);
    void (*decode)(const uint8_t* bytes, float* values, int64_t first, int64_t last);
};

// The points of a lattice, laid out for the search. They are another package's data, handed over at run time.
struct LatticePoints {
    uint16_t pairs[2048];         // of each point: the numbers of its halves, see lattice.h
    uint16_t numbers[1 << 16];    // of the point that a pair is
    uint8_t partner_counts[81];   // how many second halves each first half has, in lexical order of halves
    uint8_t partners[2048];       // the places of those second halves in that order
};

extern const LatticePoints* LATTICES[64];  // by the number of their format
