// IQ4_NL, IQ4_XS, MXFP4 and NVFP4: codes that index sixteen uneven levels.
#include "length.h"
#include "packing.h"
#include "scaled.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// The levels of llama.cpp's non-linear 4-bit types, for codes 0 to 15. A value midway takes the lower one.
struct NonLinear {
    static constexpr float PEAKS[] = {-127, 119, -143, -111, -135, 143, 111, -119};
    static constexpr bool QUICK = false;
    static constexpr int LEVELS[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

    static Floats nearest(Floats values) {
        Floats level = all(float(LEVELS[0]));
        for (int i = 1; i < 16; i++) level = values > middle(i) ? all(float(LEVELS[i])) : level;
        return level;
    }

    static Ints code(Floats values) {
        Ints code = all(0);
        for (int i = 1; i < 16; i++) code = values > middle(i) ? all(i) : code;
        return code;
    }

    static Floats decoded(Ints codes) {
        Floats level = all(float(LEVELS[0]));
        for (int i = 1; i < 16; i++) level = codes == i ? all(float(LEVELS[i])) : level;
        return level;
    }

  private:
    static constexpr float middle(int i) { return (LEVELS[i - 1] + LEVELS[i]) * 0.5f; }
};

// Fills in the codes of 32 values; returns the weighted sum of level times value.
template <bool WEIGHTED>
Floats code_non_linear(const Floats* values, Weights<WEIGHTED> weights, Floats scale, Ints* codes) {
    Floats inverse = reciprocal(scale);
    return ordered_sum<32>([&](int i) {
        Floats scaled = values[i] * inverse;
        codes[i] = NonLinear::code(scaled);
        return weights.times(i, NonLinear::nearest(scaled)) * values[i];
    });
}

struct IQ4_NL {
    static constexpr int ID = 20, SIZE = 32, BYTES = 18;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32];
        Floats scale = stored(search_scale<NonLinear, 32>(values, weights, unit), unit);
        Floats product = code_non_linear(values, weights, scale, codes);
        pack_half(half_of(scale * lengthening<32>(values, weights, product * scale), unit), bytes);
        pack<4, 16>(codes, bytes + 2);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[32];
        unpack<4, 16>(bytes + 2, codes);
        Floats scale = unpack_half(bytes);
        for (int i = 0; i < 32; i++) values[i] = scale * NonLinear::decoded(codes[i]);
    }
};

struct IQ4_XS {
    static constexpr int ID = 23, SIZE = 256, BYTES = 136;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        auto found = ScaledSuperBlock<NonLinear, 8, 32, -32, 31, WEIGHTED>(values, weights).search(unit);
        Floats step = half(found.step, unit), products[8];
        bytes[2] = bytes[3] = all(0);
        for (int i = 0; i < 8; i++) {
            Ints multiple = truncated(found.scales[i]) + 32;
            bytes[2 + i / 4] |= multiple >> 4 << 2 * (i % 4);
            Ints low = multiple & 15;
            bytes[4 + i / 2] = i % 2 ? bytes[4 + i / 2] | low << 4 : low;
            Ints codes[32];
            Floats product = code_non_linear(values + 32 * i, weights.from(32 * i), step * found.scales[i], codes);
            products[i] = product * found.scales[i];
            pack<4, 16>(codes, bytes + 8 + 16 * i);
        }
        Floats kept = ordered_sum<8>([&](int i) { return products[i]; }) * step;
        pack_half(half_of(step * lengthening<256>(values, weights, kept), unit), bytes);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats step = unpack_half(bytes);
        for (int i = 0; i < 8; i++) {
            Ints low = bytes[4 + i / 2] >> 4 * (i % 2) & 15, high = bytes[2 + i / 4] >> 2 * (i % 4) & 3;
            Floats scale = step * to_float((low | high << 4) - 32);
            Ints codes[32];
            unpack<4, 16>(bytes + 8 + 16 * i, codes);
            for (int j = 0; j < 32; j++) values[32 * i + j] = scale * NonLinear::decoded(codes[j]);
        }
    }
};

// E2M1 of the OCP microscaling specification, doubled to whole numbers: 0, 1, 2, 3, 4, 6, 8 and 12, and a sign.
struct Microfloat {
    // The levels times a power of two. 2^23 times the values must be finite.
    struct Scaled {
        Floats top;
        Ints least;

        explicit Scaled(Floats scale) : top(12.0f * scale), least(bits(2.0f * scale)) {}

        // Of a magnitude; a tie goes to the even mantissa, as in IEEE 754.
        Floats nearest(Floats positive) const {
            Floats whole = whole_of(positive);
            return smaller((positive + whole) - whole, top);
        }

        // The multiple that a magnitude is rounded to, and two more for each distance that is above the least.
        Ints code(Floats values) const {
            Floats positive = magnitude(values), whole = whole_of(positive);
            Ints multiple = bits(positive + whole) - bits(whole), above = bits(whole) - (least + TO_WHOLE);
            Ints code = smaller(multiple + (above >> 22), all(7));
            return code | (bits(values) >> 28 & -code & 8);  // minus zero is never written
        }

      private:
        static constexpr int TO_WHOLE = 22 << 23;

        // Added to this, a magnitude is rounded to a multiple of the distance between levels: 1 below 4, 2 below 8.
        Floats whole_of(Floats positive) const {
            return from_bits(larger(bits(positive) & 0x7f800000, least) + TO_WHOLE);
        }
    };

    static Floats decoded(Ints codes) {
        Ints code = codes & 7;
        Floats level = code < 2 ? to_float(code) : from_bits((code + 254) << 22);
        return codes > 8 ? -level : level;
    }
};

struct MXFP4 {
    static constexpr int ID = 39, SIZE = 32, BYTES = 17;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints peak = bits(unit) >> 23, exponent;
        Floats largest = from_bits(largest_bits<32>(values));
        if constexpr (WEIGHTED) exponent = search(values, weights, peak, largest);
        else exponent = larger(peak + (largest > ENOUGH ? all(-1) : all(-2)), all(0));
        bytes[0] = exponent;
        Microfloat::Scaled levels(scale_of(exponent - peak));
        pack_each<4, 16>([&](int i) { return levels.code(values[i]); }, bytes + 1);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints exponent = bytes[0];  // of the scale of undoubled levels; 2^-128 and 2^-127 are subnormal
        Floats scale = from_bits(exponent < 2 ? all(0x00200000) << exponent : (exponent - 1) << 23);
        Ints codes[32];
        unpack<4, 16>(bytes + 1, codes);
        for (int i = 0; i < 32; i++) values[i] = scale * Microfloat::decoded(codes[i]);
    }

  private:
    // Where all weigh alike, the exponent that puts the peak between 4 and 8 (6 is the top) is the best up to 7.25.
    static constexpr float ENOUGH = 7.25f / 4;

    // Tries that exponent, and one more where the peak is above 6.5, else one less, which suits blocks whose peak has
    // little weight.
    static Ints search(const Floats* values, Weights<true> weights, Ints peak, Floats largest) {
        Ints exponent = all(0);
        Best gains;
        const Ints shifts[] = {all(-2), largest > 6.5f / 4 ? all(-1) : all(-3)};
        for (Ints shift : shifts) {
            Ints trial = larger(peak + shift, all(0));
            Microfloat::Scaled levels(scale_of(trial - peak));
            Ints better = gains.improved_by(-ordered_sum<32>([&](int i) {
                Floats positive = magnitude(values[i]), miss = levels.nearest(positive) - positive;
                return weights.times(i, miss) * miss;
            }));
            exponent = better ? trial : exponent;
        }
        return exponent;
    }

    // What a doubled level is worth under a shared exponent relative to the unit's.
    static Floats scale_of(Ints exponent) { return from_bits((exponent + 126) << 23); }
};

// Sub-blocks of 16 values whose scales are in E4M3 without a sign. Scales are absolute: magnitudes above 2688 saturate,
// and those below 2^-11 vanish.
struct NVFP4 {
    static constexpr int ID = 40, SIZE = 64, BYTES = 36;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        for (int i = 0; i < SIZE; i += 16) {
            Ints scale_code = search(values + i, weights.from(i), unit);
            Floats inverse = unit * (1.0f / scale_of(scale_code));
            Microfloat::Scaled levels(all(1.0f));
            bytes[i / 16] = scale_code;
            auto code = [&](int j) { return levels.code(clamp(values[i + j] * inverse, -12, 12)); };
            pack_each<4, 8>(code, bytes + 4 + i / 2);
        }
    }

    static void decode(const Ints* bytes, Floats* values) {
        for (int i = 0; i < SIZE; i += 16) {
            Ints codes[16];
            unpack<4, 8>(bytes + 4 + i / 2, codes);
            Floats scale = bytes[i / 16] == 127 ? all(0.0f) : scale_of(bytes[i / 16]);  // 127 would be NaN
            for (int j = 0; j < 16; j++) values[i + j] = scale * Microfloat::decoded(codes[j]);
        }
    }

  private:
    // The best of a few scales near the one that puts the peak at the top level: 8 apart, they differ by half.
    template <bool WEIGHTED> static Ints search(const Floats* values, Weights<WEIGHTED> weights, Floats unit) {
        constexpr int steps[] = {0, 4, 1, 3, -1, 5, 2, -2, 6, -3, 7};
        Floats spanning = smaller(from_bits(largest_bits<16>(values)) * float(1.0 / 6) * unit, all(448.0f));
        Ints normal = (bits(spanning) >> 20) - (120 << 3);
        Ints first = spanning < 0x1p-6f ? truncated(spanning * 0x1p9f) : normal, best = all(0);
        Floats inverse_unit = 1.0f / unit;
        Microfloat::Scaled levels(all(1.0f));
        Best gains;
        for (int step : steps) {
            Ints code = smaller(larger(first + step, all(1)), all(126));
            Floats scale = scale_of(code), inverse = unit * (1.0f / scale), of_unit = scale * inverse_unit;
            Ints better = gains.improved_by(-ordered_sum<16>([&](int i) {
                Floats positive = magnitude(values[i]), scaled = smaller(positive * inverse, all(12.0f));
                Floats miss = levels.nearest(scaled) * of_unit - positive;
                return weights.times(i, miss) * miss;
            }));
            best = better ? code : best;
        }
        return best;
    }

    // What a doubled level is worth.
    static Floats scale_of(Ints code) {
        Ints exponent = code >> 3 & 15, mantissa = code & 7;
        Floats normal = from_bits((exponent + 120) << 23 | mantissa << 20);
        return (exponent > 0 ? normal : to_float(mantissa) * 0x1p-9f) * 0.5f;
    }
};

extern const Kernel CODEBOOK[] = {kernel<IQ4_NL>(), kernel<IQ4_XS>(), kernel<MXFP4>(), kernel<NVFP4>(), {}};

}  // namespace
