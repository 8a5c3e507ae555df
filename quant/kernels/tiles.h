// Between rows in memory and lanes in registers: LANES consecutive blocks are transposed, so that vector i holds
// value i (or byte i) of each block.
#pragma once

#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

inline Floats load(const Half* from) { return float_from_half(load_shorts(&from->bits)); }
inline Floats load(const Brain* from) { return from_bits(load_shorts(&from->bits) << 16); }

// Where each lane's block begins. Lanes beyond the last block repeat it, and their results are dropped.
template <class Input> struct Starts {
    const Input* lane[LANES];
};

template <int SIZE, class Input> void load_values(const Starts<Input>& starts, Floats* values) {
    for (int first = 0; first < SIZE; first += LANES) {
        Ints rows[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const Input* from = starts.lane[lane] + first;
            prefetch(from + SIZE * LANES);  // most likely the same place of the next tile
            rows[lane] = bits(load(from));
        }
        transpose(rows);
        for (int i = 0; i < LANES; i++) values[first + i] = from_bits(rows[i]);
    }
}

template <int SIZE, class Input>
void load_blocks(const Input* blocks, int64_t first, int64_t count, Floats* values, int64_t stride = SIZE) {
    Starts<Input> starts;
    for (int lane = 0; lane < LANES; lane++) starts.lane[lane] = blocks + (first + (lane < count ? lane : 0)) * stride;
    load_values<SIZE>(starts, values);
}

template <int SIZE> void load_weights(const Rows& rows, int64_t first, Floats* weights) {
    Starts<float> starts;
    int64_t block = first % rows.blocks;
    for (int lane = 0; lane < LANES; lane++) {
        starts.lane[lane] = rows.weights + block * SIZE;
        block = block + 1 < rows.blocks ? block + 1 : 0;
    }
    load_values<SIZE>(starts, weights);
}

template <int SIZE> void load_rows(const Rows& rows, int64_t first, int64_t count, Floats* values) {
    switch (rows.type) {
        case 0: return load_blocks<SIZE>(static_cast<const float*>(rows.values), first, count, values);
        case 1: return load_blocks<SIZE>(static_cast<const Half*>(rows.values), first, count, values);
        default: return load_blocks<SIZE>(static_cast<const Brain*>(rows.values), first, count, values);
    }
}

constexpr int words_of(int bytes) { return (bytes + 3) / 4; }

// Bytes, one to a lane of each vector, to `count` blocks of BYTES bytes.
template <int BYTES> void store_bytes(const Ints* bytes, uint8_t* blocks, int64_t count) {
    constexpr int WORDS = words_of(BYTES), WIDTH = 4 * LANES;
    for (int first = 0; first < WORDS; first += LANES) {
        Ints rows[LANES];
        for (int i = 0; i < LANES; i++) {
            const Ints* word = bytes + 4 * (first + i);
            rows[i] = first + i < WORDS ? word[0] | word[1] << 8 | word[2] << 16 | word[3] << 24 : all(0);
        }
        transpose(rows);
        for (int lane = 0; lane < count; lane++) {
            uint8_t* block = blocks + lane * BYTES + 4 * first;
            if (4 * first + WIDTH <= BYTES) std::memcpy(block, &rows[lane], WIDTH);
            else std::memcpy(block, &rows[lane], BYTES % WIDTH);
        }
    }
}

// The inverse of `store_bytes`. Lanes beyond `count` hold zeros.
template <int BYTES> void load_bytes(const uint8_t* blocks, int64_t count, Ints* bytes) {
    constexpr int WORDS = words_of(BYTES), WIDTH = 4 * LANES;
    for (int first = 0; first < WORDS; first += LANES) {
        Ints rows[LANES] = {};
        for (int lane = 0; lane < count; lane++) {
            const uint8_t* block = blocks + lane * BYTES + 4 * first;
            if (4 * first + WIDTH <= BYTES) std::memcpy(&rows[lane], block, WIDTH);
            else std::memcpy(&rows[lane], block, BYTES % WIDTH);
        }
        transpose(rows);
        for (int i = 0; i < LANES && first + i < WORDS; i++)
            for (int place = 0; place < 4; place++) bytes[4 * (first + i) + place] = rows[i] >> 8 * place & 255;
    }
}

// The nearest bfloat16, a tie going to the even one; what is not a number stays that.
inline void store(Floats values, Brain* to) {
    Ints number = bits(values), nearest = number + 0x7fff + (number >> 16 & 1);
    Ints upper = values == values ? nearest : (number | 0x400000);
    store_shorts(upper >> 16 & 0xffff, &to->bits);
}

template <int SIZE, class Output>
void store_values(const Floats* values, Output* blocks, int64_t count, int64_t stride = SIZE) {
    for (int first = 0; first < SIZE; first += LANES) {
        Ints rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = bits(values[first + i]);
        transpose(rows);
        for (int lane = 0; lane < count; lane++) store(from_bits(rows[lane]), blocks + lane * stride + first);
    }
}

// The weights of values. When all are 1 there is nothing to load or to multiply with, which changes no result.
template <bool WEIGHTED> struct Weights {
    const Floats* values;

    Floats times(int i, Floats value) const {
        if constexpr (WEIGHTED) return values[i] * value;
        else return value;
    }
    Weights from(int i) const { return {WEIGHTED ? values + i : nullptr}; }
};

// The largest magnitude, as bits; in runs of four, which need not wait for each other.
template <int SIZE> Ints largest_bits(const Floats* values) {
    Ints largest[4] = {};
    for (int i = 0; i < SIZE; i += 4)
        for (int j = 0; j < 4; j++) largest[j] = larger(largest[j], bits(magnitude(values[i + j])));
    return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
}

// The first lane of a largest magnitude that is not finite, or -1.
inline int first_bad(Ints largest) {
    Ints bad = largest >= 0x7f800000;
    bool some = any(bad);
    for (int lane = 0; some && lane < LANES; lane++)
        if (bad[lane]) return lane;
    return -1;
}

// Divides a tile by its unit, which it returns; `bad` becomes the first lane that is not finite, or -1.
template <int SIZE> Floats to_unit(Floats* values, int& bad) {
    Ints largest = largest_bits<SIZE>(values);
    bad = first_bad(largest);
    Floats unit = unit_of(largest), inverse = 1.0f / unit;
    for (int i = 0; i < SIZE; i++) values[i] = values[i] * inverse;
    return unit;
}

template <class Format, bool WEIGHTED> int64_t encode_blocks(const Rows& rows, int64_t first, int64_t last) {
    Floats values[Format::SIZE], weights[WEIGHTED ? Format::SIZE : 1];
    Ints bytes[4 * words_of(Format::BYTES)] = {};
    for (; first < last; first += LANES) {
        int64_t count = last - first < LANES ? last - first : LANES;
        load_rows<Format::SIZE>(rows, first, count, values);
        int bad;
        Floats unit = to_unit<Format::SIZE>(values, bad);
        if (bad >= 0) return first + (bad < count ? bad : 0);
        if constexpr (WEIGHTED) load_weights<Format::SIZE>(rows, first, weights);
        Format::encode(values, Weights<WEIGHTED>{weights}, unit, bytes);
        store_bytes<Format::BYTES>(bytes, rows.bytes + first * Format::BYTES, count);
    }
    return -1;
}

template <class Format> int64_t encode(const Rows& rows, int64_t first, int64_t last) {
    if (rows.weights) return encode_blocks<Format, true>(rows, first, last);
    return encode_blocks<Format, false>(rows, first, last);
}

template <class Format, class Output>
void decode_blocks(const uint8_t* blocks, Output* values, int64_t first, int64_t last) {
    Ints bytes[4 * words_of(Format::BYTES)];
    Floats tile[Format::SIZE];
    for (; first < last; first += LANES) {
        int64_t count = last - first < LANES ? last - first : LANES;
        load_bytes<Format::BYTES>(blocks + first * Format::BYTES, count, bytes);
        Format::decode(bytes, tile);
        store_values<Format::SIZE>(tile, values + first * Format::SIZE, count);
    }
}

template <class Format>
void decode(const uint8_t* blocks, void* values, int type, int64_t first, int64_t last) {
    if (type == 0) decode_blocks<Format>(blocks, static_cast<float*>(values), first, last);
    else decode_blocks<Format>(blocks, static_cast<Brain*>(values), first, last);
}

template <class Format> constexpr Kernel kernel() {
    return {Format::ID, Format::SIZE, Format::BYTES, encode<Format>, decode<Format>, nullptr};
}

}  // namespace
