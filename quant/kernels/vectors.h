// A register of lanes as the vector types of GCC and Clang have it. one_lane.h declares the same names for one lane.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// With AVX-512 eight lanes as well: its masks and 32 registers are what counts, and tiles of 16 blocks crowd the cache.
#if defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

inline Floats all(float value) { return value - Floats{}; }
inline Ints all(int32_t value) { return value - Ints{}; }
inline Ints bits(Floats value) { return (Ints)value; }
inline Floats from_bits(Ints value) { return (Floats)value; }
inline Ints truncated(Floats value) { return __builtin_convertvector(value, Ints); }
inline Floats to_float(Ints value) { return __builtin_convertvector(value, Floats); }

inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
#if defined(__AVX2__)  // by name, because compilers make a comparison and a selection of the general form
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE4_2__)
inline Floats smaller(Floats a, Floats b) { return _mm_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
#else
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif

// Whether a bit is set in any lane.
inline bool any(Ints lanes) {
    int64_t any = 0, parts[sizeof lanes / sizeof any];
    std::memcpy(parts, &lanes, sizeof lanes);
    for (int64_t part : parts) any |= part;
    return any;
}

#if defined(__clang__) || __GNUC__ >= 12
#define KERNELS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KERNELS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

inline Ints interleaved_low(Ints a, Ints b) {
#if defined(__AVX2__)
    return KERNELS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return KERNELS_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

inline Ints interleaved_high(Ints a, Ints b) {
#if defined(__AVX2__)
    return KERNELS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return KERNELS_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// Swaps rows and columns: each round interleaves the first half of the rows with the second.
inline void transpose(Ints (&rows)[LANES]) {
    for (int round = 1; round < LANES; round *= 2) {
        Ints next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = interleaved_low(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = interleaved_high(rows[i], rows[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

inline void prefetch(const void* from) { __builtin_prefetch(from); }

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// Numbers without a sign.
inline Ints load_shorts(const uint16_t* from) {
    Shorts shorts;
    std::memcpy(&shorts, from, sizeof shorts);
    return __builtin_convertvector(shorts, Ints);
}

// Numbers with a sign.
inline Ints load_signed_bytes(const uint8_t* from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
}

inline void store(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }

inline void store_shorts(Ints numbers, uint16_t* to) {
    Shorts shorts = __builtin_convertvector(numbers, Shorts);
    std::memcpy(to, &shorts, sizeof shorts);
}

// The first `count` lanes alone; the others are zero.
inline Floats load_some(const float* from, int64_t count) {
    Floats values{};
    std::memcpy(&values, from, count * sizeof(float));
    return values;
}

inline void store_some(Floats values, float* to, int64_t count) { std::memcpy(to, &values, count * sizeof(float)); }

}  // namespace
