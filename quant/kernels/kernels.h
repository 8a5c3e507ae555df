// What dispatch.cpp knows about the kernels that each instruction set brings.
#pragma once

#include <cstdint>

// Rows to quantize: contiguous blocks of values in, contiguous blocks of bytes out.
struct Rows {
    const void* values;
    int type;              // of the values: 0 float32, 1 float16, 2 bfloat16
    const float* weights;  // of a row's columns; null: all 1
    int64_t blocks;        // in a row
    uint8_t* bytes;
};

// Blocks, one to a lane, to be rounded with error feedback: quant/formats/lanes.py (Coupling) explains the fields.
struct Choosing {
    const float* values;                      // [lanes, size], value_stride from lane to lane
    const void* added;                        // [lanes, size], what errors of other blocks add to them; null: nothing
    int type;                                 // of added and errors, numbered as for Rows and not float16
    const float* search_weights;              // [size], of values in the search for scales; null: all 1
    const float *carried, *slopes, *metric;   // [size, size]: a row for each value that errors and changes reach
    const float *first_weights, *weights;     // [size], of values in turn and later
    uint8_t* bytes;                           // [lanes, block_bytes], the result
    void* errors;                             // [lanes, size], error_stride from lane to lane: values less what it holds
    int64_t lanes, value_stride, error_stride;
    int sweeps;
};

struct Kernel {
    int id;  // of the format in a GGUF file
    int block_size;
    int block_bytes;
    // Blocks first to last; returns the first that holds a value that is not finite, or -1.
    int64_t (*encode)(const Rows& rows, int64_t first, int64_t last);
    // Values of the type, which is numbered as for Rows and not float16.
    void (*decode)(const uint8_t* bytes, void* values, int type, int64_t first, int64_t last);
    // Lanes first to last; null where levels are not all that there is to a format but scales. Returns as `encode` does.
    int64_t (*choose)(const Choosing& task, int64_t first, int64_t last);
};

// A table of kernels that ends with an empty one. A GPU has none: its programs name what they are for, see cuda.cu.
#if defined(__CUDACC__)
#define KERNEL_TABLE(name, ...)
#else
#define KERNEL_TABLE(name, ...) extern const Kernel name[] = {__VA_ARGS__, {}};
#endif

constexpr int MOST_TERMS = 256;

// The points of a lattice, laid out for the search. They are another package's data, handed over at run time.
struct LatticePoints {
    uint16_t pairs[2048];       // of each point: the numbers of its halves, see lattice.h
    uint16_t numbers[1 << 16];  // of the point that a pair is
    // Lists of terms, whose least is sought: first what lists have in common, which are terms themselves, then one list
    // for each first half, in lexical order. Terms are the places of second halves, in that order, and shared lists.
    int shared_count;
    uint8_t shared[MOST_TERMS];       // what each shared list is called as a term
    uint8_t term_counts[MOST_TERMS];  // of each list
    uint8_t terms[2048];              // of one list after another
};

extern "C" const LatticePoints* LATTICES[64];  // by the number of their format
