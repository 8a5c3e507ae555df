// For formats with too little to compute for lanes to pay: vectors hold values of a block side by side. Only what there
// is one of for each block, such as its scale, is computed for LANES blocks together, one to a lane.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

constexpr int BLOCK = 32, VECTORS = BLOCK / LANES;

#if defined(ONE_LANE)
struct BlockOfBytes { int8_t each[BLOCK]; };
#else
typedef int8_t BlockOfBytes __attribute__((vector_size(BLOCK)));
#endif

// Whole numbers from -128 to 127, VECTORS vectors of them, to bytes.
inline void narrow(const Ints* numbers, BlockOfBytes& bytes) {
#if defined(ONE_LANE)
    for (int i = 0; i < BLOCK; i++) bytes.each[i] = int8_t(numbers[i].lane);
#elif defined(__AVX2__)  // by name, because compilers narrow each vector by itself
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32((__m256i)numbers[0], (__m256i)numbers[1]),
                                        _mm256_packs_epi32((__m256i)numbers[2], (__m256i)numbers[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    std::memcpy(&bytes, &packed, sizeof packed);
#elif defined(__SSE4_2__)
    for (int i = 0; i < VECTORS; i += 4) {
        __m128i packed = _mm_packs_epi16(_mm_packs_epi32((__m128i)numbers[i], (__m128i)numbers[i + 1]),
                                         _mm_packs_epi32((__m128i)numbers[i + 2], (__m128i)numbers[i + 3]));
        std::memcpy((char*)&bytes + i * LANES, &packed, sizeof packed);
    }
#else
    for (int i = 0; i < VECTORS; i++) {
        Bytes part = __builtin_convertvector(numbers[i], Bytes);
        std::memcpy((char*)&bytes + i * LANES, &part, LANES);
    }
#endif
}

// The largest magnitude of each of `count` blocks, as bits; of the lanes beyond, zero.
template <class Input> Ints largest_of(const Input* values, int64_t count) {
    Ints rows[LANES] = {};
    for (int block = 0; block < count; block++)
        for (int i = 0; i < VECTORS; i++)
            rows[block] = larger(rows[block], bits(magnitude(load(values + block * BLOCK + i * LANES))));
    transpose(rows);
    Ints largest = rows[0];
    for (int i = 1; i < LANES; i++) largest = larger(largest, rows[i]);
    return largest;
}

// Sums over the values of each block, one to a lane. terms[block] holds the sums of every eighth value; the eight are
// added pairwise.
inline Floats sum_of(const Floats (&terms)[LANES][8 / LANES]) {
    Floats parts[8];
    for (int i = 0; i < 8 / LANES; i++) {
        Ints rows[LANES];
        for (int block = 0; block < LANES; block++) rows[block] = bits(terms[block][i]);
        transpose(rows);
        for (int j = 0; j < LANES; j++) parts[i * LANES + j] = from_bits(rows[j]);
    }
    return ordered_sum<8>([&](int i) { return parts[i]; });
}

}  // namespace
