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
