// Q8_0, without a search.
#include "side_by_side.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

struct Q8_0 {
    static constexpr int ID = 8, SIZE = BLOCK, BYTES = 2 + BLOCK;
};

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
            uint8_t* to = bytes + (first + block) * Q8_0::BYTES;
            uint16_t scale = scales[block];
            std::memcpy(to, &scale, sizeof scale);
            BlockOfBytes narrowed;
            narrow(codes, narrowed);
            std::memcpy(to + sizeof scale, &narrowed, sizeof narrowed);
        }
    }
    return -1;
}

template <class Output> void decode_8_0(const uint8_t* bytes, Output* values, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const uint8_t* from = bytes + block * Q8_0::BYTES;
        uint16_t half;
        std::memcpy(&half, from, sizeof half);
        Floats scale = float_from_half(all(int32_t{half}));
        for (int i = 0; i < VECTORS; i++) {
            Floats levels = to_float(load_signed_bytes(from + sizeof half + i * LANES));
            store(levels * scale, values + block * BLOCK + i * LANES);
        }
    }
}

template <> inline int64_t encode<Q8_0>(const Rows& rows, int64_t first, int64_t last) {
    switch (rows.type) {
        case 0: return encode_8_0(static_cast<const float*>(rows.values), rows.bytes, first, last);
        case 1: return encode_8_0(static_cast<const Half*>(rows.values), rows.bytes, first, last);
        default: return encode_8_0(static_cast<const Brain*>(rows.values), rows.bytes, first, last);
    }
}

template <> inline void decode<Q8_0>(const uint8_t* bytes, void* values, int type, int64_t first, int64_t last) {
    if (type == 0) decode_8_0(bytes, static_cast<float*>(values), first, last);
    else decode_8_0(bytes, static_cast<Brain*>(values), first, last);
}

KERNEL_TABLE(ROUNDING, kernel<Q8_0>())

}  // namespace
