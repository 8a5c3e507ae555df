// Q4_1, Q5_1, Q2_K, Q4_K and Q5_K.
#include "affine.h"
#include "feedback.h"
#include "length.h"
#include "packing.h"
#include "scaled.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Blocks of 32 values with a scale and an offset of their own.
template <int TOP> struct SmallAffine {
    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* scales, Ints* codes) {
        AffineBlock<32, TOP, true, WEIGHTED> block(values, weights);
        Ints scale, minimum;
        search_scale_and_minimum(block, unit, scale, minimum);
        pack_half(scale, scales);
        pack_half(minimum ^ 0x8000, scales + 2);
        Floats offset = stored(minimum, unit), inverse = reciprocal(stored(scale, unit));
        for (int i = 0; i < 32; i++) codes[i] = truncated(block.code(i, offset, inverse));
    }

    static void decode(const Ints* scales, const Ints* codes, Floats* values) {
        Floats scale = unpack_half(scales), offset = unpack_half(scales + 2);
        for (int i = 0; i < 32; i++) values[i] = scale * to_float(codes[i]) + offset;
    }

    static constexpr int SUB_BLOCKS = 1;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        scale[0] = unpack_half(bytes);
        minimum[0] = -unpack_half(bytes + 2);
    }
};

struct Q4_1 : SmallAffine<15> {
    static constexpr int ID = 3, SIZE = 32, BYTES = 20;
    using Chosen = Single<Uniform<0, 15>>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32];
        SmallAffine<15>::encode(values, weights, unit, bytes, codes);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q4_1>(levels, bytes); }
    static void pack_codes(const Ints* codes, Ints* bytes) { pack<4, 16>(codes, bytes + 4); }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[32];
        unpack<4, 16>(bytes + 4, codes);
        SmallAffine<15>::decode(bytes, codes, values);
    }
};

struct Q5_1 : SmallAffine<31> {
    static constexpr int ID = 7, SIZE = 32, BYTES = 24;
    using Chosen = Single<Uniform<0, 31>>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32];
        SmallAffine<31>::encode(values, weights, unit, bytes, codes);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q5_1>(levels, bytes); }
    static void pack_codes(const Ints* codes, Ints* bytes) { pack_5_bits(codes, bytes + 4); }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[32];
        unpack_5_bits(bytes + 4, codes);
        SmallAffine<31>::decode(bytes, codes, values);
    }
};

// Blocks of 256 values in COUNT sub-blocks with codes up to TOP and multiples up to LARGEST.
template <int COUNT, int TOP, int LARGEST> struct SuperAffine {
    static constexpr int SIZE = 256 / COUNT;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* steps, Ints* scales,
                       Ints* minima, Ints* codes) {
        using Block = AffineBlock<SIZE, TOP, false, WEIGHTED>;
        AffineSuperBlock<Block, COUNT, LARGEST> super_block(values, weights);
        auto found = super_block.search(unit);
        Floats scale_step = half(found.scale_step, unit), minimum_step = half(found.minimum_step, unit);
        Floats products[COUNT];
        for (int i = 0; i < COUNT; i++) {
            Floats scale = scale_step * found.scales[i], minimum = minimum_step * found.minima[i];
            Floats inverse = reciprocal(scale);
            const Block& block = super_block.blocks[i];
            Floats product = ordered_sum<SIZE>([&](int j) {
                Floats code = block.code(j, minimum, inverse);
                codes[i * SIZE + j] = truncated(code);
                return block.weights.times(j, code) * block.values[j];
            });
            products[i] = product * scale - block.value_sum * minimum;
            scales[i] = truncated(found.scales[i]);
            minima[i] = truncated(found.minima[i]);
        }
        Floats kept = ordered_sum<COUNT>([&](int i) { return products[i]; });
        Floats factor = lengthening<256>(values, weights, kept);
        pack_half(half_of(scale_step * factor, unit), steps);
        pack_half(half_of(minimum_step * factor, unit), steps + 2);
    }

    static void decode(const Floats* scale, const Floats* minimum, const Ints* codes, Floats* values) {
        for (int i = 0; i < COUNT; i++)
            for (int j = i * SIZE; j < (i + 1) * SIZE; j++) values[j] = scale[i] * to_float(codes[j]) - minimum[i];
    }

    static void scales(const Ints* steps, const Ints* multiples, const Ints* minima, Floats* scale, Floats* minimum) {
        Floats scale_step = unpack_half(steps), minimum_step = unpack_half(steps + 2);
        for (int i = 0; i < COUNT; i++) {
            scale[i] = scale_step * to_float(multiples[i]);
            minimum[i] = minimum_step * to_float(minima[i]);
        }
    }
};

struct Q2_K {
    static constexpr int ID = 10, SIZE = 256, BYTES = 84;
    using Chosen = Single<Uniform<0, 3>>;
    using Super = SuperAffine<16, 3, 15>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints scales[16], minima[16], codes[256];
        Super::encode(values, weights, unit, bytes + 80, scales, minima, codes);
        for (int i = 0; i < 16; i++) bytes[i] = scales[i] | minima[i] << 4;
        pack_codes(codes, bytes);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale[16], minimum[16];
        Ints codes[256];
        scales(bytes, scale, minimum);
        for (int i = 0; i < 2; i++) unpack<2, 32>(bytes + 16 + 32 * i, codes + 128 * i);
        Super::decode(scale, minimum, codes, values);
    }

    static constexpr int SUB_BLOCKS = 16;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        Ints multiples[16], minima[16];
        for (int i = 0; i < 16; i++) multiples[i] = bytes[i] & 15, minima[i] = bytes[i] >> 4;
        Super::scales(bytes + 80, multiples, minima, scale, minimum);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q2_K>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        for (int i = 0; i < 2; i++) pack<2, 32>(codes + 128 * i, bytes + 16 + 32 * i);
    }
};

// 8 scales and 8 minima of 6 bits in 12 bytes: scales 0-3 and minima 0-3 fill the lower bits of a byte each, whose
// upper two are the upper bits of number + 4; the lower four bits of numbers 4-7 share the last four bytes.
inline void pack_6_bits(const Ints* scales, const Ints* minima, Ints* bytes) {
    for (int i = 0; i < 4; i++) {
        bytes[i] = scales[i] | scales[i + 4] >> 4 << 6;
        bytes[i + 4] = minima[i] | minima[i + 4] >> 4 << 6;
        bytes[i + 8] = (scales[i + 4] & 15) | (minima[i + 4] & 15) << 4;
    }
}

inline void unpack_6_bits(const Ints* bytes, Ints* scales, Ints* minima) {
    for (int i = 0; i < 4; i++) {
        scales[i] = bytes[i] & 63;
        minima[i] = bytes[i + 4] & 63;
        scales[i + 4] = (bytes[i + 8] & 15) | bytes[i] >> 6 << 4;
        minima[i + 4] = bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4;
    }
}

// What Q4_K and Q5_K have in common: two steps, and multiples of 6 bits.
template <class Super> struct SixBits {
    static constexpr int SUB_BLOCKS = 8;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        Ints multiples[8], minima[8];
        unpack_6_bits(bytes + 4, multiples, minima);
        Super::scales(bytes, multiples, minima, scale, minimum);
    }
};

struct Q4_K : SixBits<SuperAffine<8, 15, 63>> {
    static constexpr int ID = 12, SIZE = 256, BYTES = 144;
    using Chosen = Single<Uniform<0, 15>>;
    using Super = SuperAffine<8, 15, 63>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints scales[8], minima[8], codes[256];
        Super::encode(values, weights, unit, bytes, scales, minima, codes);
        pack_6_bits(scales, minima, bytes + 4);
        pack_codes(codes, bytes);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale[8], minimum[8];
        Ints codes[256];
        scales(bytes, scale, minimum);
        for (int i = 0; i < 4; i++) unpack<4, 32>(bytes + 16 + 32 * i, codes + 64 * i);
        Super::decode(scale, minimum, codes, values);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q4_K>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        for (int i = 0; i < 4; i++) pack<4, 32>(codes + 64 * i, bytes + 16 + 32 * i);
    }
};

struct Q5_K : SixBits<SuperAffine<8, 31, 63>> {
    static constexpr int ID = 13, SIZE = 256, BYTES = 176;
    using Chosen = Single<Uniform<0, 31>>;
    using Super = SuperAffine<8, 31, 63>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints scales[8], minima[8], codes[256];
        Super::encode(values, weights, unit, bytes, scales, minima, codes);
        pack_6_bits(scales, minima, bytes + 4);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q5_K>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        pack_each<1, 32>([&](int i) { return codes[i] >> 4; }, bytes + 16);
        for (int i = 0; i < 256; i += 64)
            pack_each<4, 32>([&](int j) { return codes[i + j] & 15; }, bytes + 48 + i / 2);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale[8], minimum[8];
        Ints codes[256], fifth[256];
        scales(bytes, scale, minimum);
        unpack<1, 32>(bytes + 16, fifth);
        for (int i = 0; i < 4; i++) unpack<4, 32>(bytes + 48 + 32 * i, codes + 64 * i);
        for (int i = 0; i < 256; i++) codes[i] |= fifth[i] << 4;
        Super::decode(scale, minimum, codes, values);
    }
};

KERNEL_TABLE(AFFINE,
             choosing_kernel<Q4_1>(), choosing_kernel<Q5_1>(), choosing_kernel<Q2_K>(), choosing_kernel<Q4_K>(),
             choosing_kernel<Q5_K>())

}  // namespace
