// Q8_0: without a search there is too little to compute for lanes to pay, so vectors hold values side by side instead.
// Only the scales of LANES blocks are computed together, one to a lane.
#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

constexpr int BLOCK = 32, VECTORS = BLOCK / LANES, BYTES = 2 + BLOCK;

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Whole numbers from -128 to 127, VECTORS vectors of them, to BLOCK bytes.
inline void store_narrowed(const Ints* numbers, uint8_t* bytes) {
#if defined(__AVX2__)  // by name, because compilers narrow each vector by itself
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32((__m256i)numbers[0], (__m256i)numbers[1]),
                                        _mm256_packs_epi32((__m256i)numbers[2], (__m256i)numbers[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    std::memcpy(bytes, &packed, BLOCK);
#elif defined(__SSE4_2__)
    for (int i = 0; i < VECTORS; i += 4) {
        __m128i packed = _mm_packs_epi16(_mm_packs_epi32((__m128i)numbers[i], (__m128i)numbers[i + 1]),
                                         _mm_packs_epi32((__m128i)numbers[i + 2], (__m128i)numbers[i + 3]));
        std::memcpy(bytes + i * LANES, &packed, sizeof packed);
    }
#else
    for (int i = 0; i < VECTORS; i++) {
        Bytes narrow = __builtin_convertvector(numbers[i], Bytes);
        std::memcpy(bytes + i * LANES, &narrow, LANES);
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

template <class Input> int64_t encode_8_0(const Input* values, uint8_t* bytes, int64_t first, int64_t last) {
    for (; first < last; first += LANES) {
        int64_t count = last - first < LANES ? last - first : LANES;
        const Input* from = values + first * BLOCK;
        Ints largest = largest_of(from, count);
        if (int bad = first_bad(largest); bad >= 0) return first + bad;
        Floats unit = unit_of(largest), inverse_unit = 1.0f / unit;
        Ints scales = half_of(from_bits(largest) * inverse_unit / 127.0f, unit);
        Floats inverses = reciprocal(stored(scales, unit)) * inverse_unit;
        for (int block = 0; block < count; block++) {
            Floats inverse = all(inverses[block]);
            Ints codes[VECTORS];
            for (int i = 0; i < VECTORS; i++)
                codes[i] = truncated(rounded(clamp(load(from + block * BLOCK + i * LANES) * inverse, -127, 127)));
            uint8_t* to = bytes + (first + block) * BYTES;
            uint16_t scale = scales[block];
            std::memcpy(to, &scale, sizeof scale);
            store_narrowed(codes, to + sizeof scale);
        }
    }
    return -1;
}

template <class Output> void decode_8_0(const uint8_t* bytes, Output* values, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const uint8_t* from = bytes + block * BYTES;
        uint16_t half;
        std::memcpy(&half, from, sizeof half);
        Floats scale = float_from_half(all(int32_t{half}));
        for (int i = 0; i < VECTORS; i++) {
            Bytes narrow;
            std::memcpy(&narrow, from + sizeof half + i * LANES, LANES);
            store(to_float(__builtin_convertvector(narrow, Ints)) * scale, values + block * BLOCK + i * LANES);
        }
    }
}

struct Q8_0 {
    static int64_t encode(const Rows& rows, int64_t first, int64_t last) {
        switch (rows.type) {
            case 0: return encode_8_0(static_cast<const float*>(rows.values), rows.bytes, first, last);
            case 1: return encode_8_0(static_cast<const Half*>(rows.values), rows.bytes, first, last);
            default: return encode_8_0(static_cast<const Brain*>(rows.values), rows.bytes, first, last);
        }
    }

    static void decode(const uint8_t* bytes, void* values, int type, int64_t first, int64_t last) {
        if (type == 0) decode_8_0(bytes, static_cast<float*>(values), first, last);
        else decode_8_0(bytes, static_cast<Brain*>(values), first, last);
    }
};

extern const Kernel ROUNDING[] = {{8, BLOCK, BYTES, Q8_0::encode, Q8_0::decode}, {}};

}  // namespace
