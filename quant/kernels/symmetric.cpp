// Q5_0, Q4_0, Q6_K and Q3_K.
#include "feedback.h"
#include "length.h"
#include "packing.h"
#include "scaled.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Blocks of 32 values with a scale of their own.
template <class Levels> struct SmallScaled {
    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes, Ints* codes) {
        Floats scale = stored(search_scale<Levels, 32>(values, weights, unit), unit), inverse = reciprocal(scale);
        Floats product = ordered_sum<32>([&](int i) {
            Floats level = Levels::nearest(values[i] * inverse);
            codes[i] = Levels::code_of(level);
            return weights.times(i, level) * values[i];
        });
        pack_half(half_of(scale * lengthening<32>(values, weights, product * scale), unit), bytes);
    }
};

struct Levels4 : Uniform<-8, 7> {
    static constexpr float PEAKS[] = {-8.5f, -9.5f, -7.25f, -8.0f};
};

struct Q4_0 : OneScale {
    static constexpr int ID = 2, SIZE = 32, BYTES = 18;
    using Chosen = Single<Uniform<-8, 7>>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32];
        SmallScaled<Levels4>::encode(values, weights, unit, bytes, codes);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q4_0>(levels, bytes); }
    static void pack_codes(const Ints* codes, Ints* bytes) { pack<4, 16>(codes, bytes + 2); }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[32];
        unpack<4, 16>(bytes + 2, codes);
        Floats scale = unpack_half(bytes);
        for (int i = 0; i < 32; i++) values[i] = scale * to_float(codes[i] - 8);
    }
};

struct Q5_0 : OneScale {
    static constexpr int ID = 6, SIZE = 32, BYTES = 22;
    using Chosen = Single<Uniform<-16, 15>>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32];
        SmallScaled<Uniform<-16, 15>>::encode(values, weights, unit, bytes, codes);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q5_0>(levels, bytes); }
    static void pack_codes(const Ints* codes, Ints* bytes) { pack_5_bits(codes, bytes + 2); }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[32];
        unpack_5_bits(bytes + 2, codes);
        Floats scale = unpack_half(bytes);
        for (int i = 0; i < 32; i++) values[i] = scale * to_float(codes[i] - 16);
    }
};

// Blocks of 256 values in 16 sub-blocks, whose multiples of the step go from LOWEST to HIGHEST. LENGTHENED blocks get
// back the length that least squares takes from them.
template <class Levels, int LOWEST, int HIGHEST, bool LENGTHENED> struct SuperScaled {
    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* step, Ints* multiples,
                       Ints* codes) {
        auto found = ScaledSuperBlock<Levels, 16, 16, LOWEST, HIGHEST, WEIGHTED>(values, weights).search(unit);
        Ints step_bits = half_of(found.step, unit);
        Floats rounded_step = stored(step_bits, unit), products[16];
        for (int i = 0; i < 16; i++) {
            Floats inverse = reciprocal(rounded_step * found.scales[i]);
            auto coded = [&](int j) {
                Floats level = Levels::nearest(values[j] * inverse);
                codes[j] = Levels::code_of(level);
                return weights.times(j, level) * values[j];
            };
            products[i] = ordered_sum<16>([&](int j) { return coded(16 * i + j); }) * found.scales[i];
            multiples[i] = truncated(found.scales[i]);
        }
        if constexpr (LENGTHENED) {
            Floats kept = ordered_sum<16>([&](int i) { return products[i]; }) * rounded_step;
            step_bits = half_of(rounded_step * lengthening<256>(values, weights, kept), unit);
        }
        pack_half(step_bits, step);
    }

    static void decode(const Floats* scale, const Ints* levels, Floats* values) {
        for (int i = 0; i < 256; i++) values[i] = scale[i / 16] * to_float(levels[i]);
    }

    static void scales(const Ints* step, const Ints* multiples, Floats* scale, Floats* minimum) {
        Floats whole = unpack_half(step);
        for (int i = 0; i < 16; i++) scale[i] = whole * to_float(multiples[i]), minimum[i] = all(0.0f);
    }
};

struct Q6_K {
    static constexpr int ID = 14, SIZE = 256, BYTES = 210;
    using Chosen = Single<Uniform<-32, 31>>;
    using Super = SuperScaled<Uniform<-32, 31>, -128, 127, false>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[256];
        Super::encode(values, weights, unit, bytes + 208, bytes + 192, codes);
        for (int i = 0; i < 16; i++) bytes[192 + i] &= 255;
        pack_codes(codes, bytes);
    }

    static constexpr int SUB_BLOCKS = 16;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        Ints multiples[16];
        for (int i = 0; i < 16; i++) multiples[i] = bytes[192 + i] << 24 >> 24;
        Super::scales(bytes + 208, multiples, scale, minimum);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q6_K>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        for (int i = 0; i < 256; i += 128) {
            pack_each<4, 64>([&](int j) { return codes[i + j] & 15; }, bytes + i / 2);
            pack_each<2, 32>([&](int j) { return codes[i + j] >> 4; }, bytes + 128 + i / 4);
        }
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale[16], minimum[16];
        Ints levels[256];
        scales(bytes, scale, minimum);
        for (int i = 0; i < 256; i += 128) {
            Ints high[128];
            unpack<4, 64>(bytes + i / 2, levels + i);
            unpack<2, 32>(bytes + 128 + i / 4, high);
            for (int j = 0; j < 128; j++) levels[i + j] = (levels[i + j] | high[j] << 4) - 32;
        }
        Super::decode(scale, levels, values);
    }
};

// Where all weigh alike, a long search gains next to nothing.
template <bool WEIGHTED> struct Levels3K : Uniform<-4, 3> {
    static constexpr float PEAKS[] = {-4.2f};
    static constexpr bool QUICK = true;
};

template <> struct Levels3K<true> : Uniform<-4, 3> {
    static constexpr float PEAKS[] = {-4.4f, -5.6f, -3.8f, -3.2f, -7.0f};
};

struct Q3_K {
    static constexpr int ID = 11, SIZE = 256, BYTES = 110;
    using Chosen = Single<Uniform<-4, 3>>;
    template <bool WEIGHTED> using Super = SuperScaled<Levels3K<WEIGHTED>, -32, 31, true>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[256], multiples[16];
        Super<WEIGHTED>::encode(values, weights, unit, bytes + 108, multiples, codes);
        pack_codes(codes, bytes);
        pack_each<4, 8>([&](int i) { return (multiples[i] + 32) & 15; }, bytes + 96);
        pack_each<2, 4>([&](int i) { return (multiples[i] + 32) >> 4; }, bytes + 104);
    }

    static constexpr int SUB_BLOCKS = 16;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        Ints multiples[16], high[16];
        unpack<4, 8>(bytes + 96, multiples);
        unpack<2, 4>(bytes + 104, high);
        for (int i = 0; i < 16; i++) multiples[i] = (multiples[i] | high[i] << 4) - 32;
        Super<true>::scales(bytes + 108, multiples, scale, minimum);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q3_K>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        pack_each<1, 32>([&](int i) { return codes[i] >> 2; }, bytes);
        for (int i = 0; i < 256; i += 128)
            pack_each<2, 32>([&](int j) { return codes[i + j] & 3; }, bytes + 32 + i / 4);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale[16], minimum[16];
        Ints levels[256], third[256];
        scales(bytes, scale, minimum);
        unpack<1, 32>(bytes, third);
        for (int i = 0; i < 2; i++) unpack<2, 32>(bytes + 32 + 32 * i, levels + 128 * i);
        for (int i = 0; i < 256; i++) levels[i] = (levels[i] | third[i] << 2) - 4;
        Super<true>::decode(scale, levels, values);
    }
};

KERNEL_TABLE(SYMMETRIC,
             choosing_kernel<Q5_0>(), choosing_kernel<Q4_0>(), choosing_kernel<Q6_K>(), choosing_kernel<Q3_K>())

}  // namespace
