// IQ4_NL, IQ4_XS and MXFP4: codes that index sixteen uneven levels.
#include "packing.h"
#include "scaled.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// The levels of llama.cpp's non-linear 4-bit types, for codes 0 to 15. A value midway takes the lower one.
struct NonLinear {
    static constexpr float PEAKS[] = {-127, 119, -143, -111, -135, 143, 111, -119};
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

struct IQ4_NL {
    static constexpr int ID = 20, SIZE = 32, BYTES = 18;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32], scale = search_scale<NonLinear, 32>(values, weights, unit);
        pack_half(scale, bytes);
        Floats inverse = reciprocal(stored(scale, unit));
        for (int i = 0; i < 32; i++) codes[i] = NonLinear::code(values[i] * inverse);
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
        Ints step = half_of(found.step, unit);
        pack_half(step, bytes);
        bytes[2] = bytes[3] = all(0);
        for (int i = 0; i < 8; i++) {
            Ints multiple = truncated(found.scales[i]) + 32;
            bytes[2 + i / 4] |= multiple >> 4 << 2 * (i % 4);
            Ints low = multiple & 15;
            bytes[4 + i / 2] = i % 2 ? bytes[4 + i / 2] | low << 4 : low;
            Ints codes[32];
            Floats inverse = reciprocal(stored(step, unit) * found.scales[i]);
            for (int j = 0; j < 32; j++) codes[j] = NonLinear::code(values[32 * i + j] * inverse);
            pack<4, 16>(codes, bytes + 8 + 16 * i);
        }
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
    // The levels times a power of two.
    struct Scaled {
        Floats top;
        Ints least;

        explicit Scaled(Floats scale) : top(12.0f * scale), least(bits(2.0f * scale)) {}

        // Of a magnitude; a tie goes to the even mantissa, as in IEEE 754.
        Floats nearest(Floats positive) const {
            // Added to this, a magnitude is rounded to a multiple of the distance between levels: 1 below 4, 2 below 8.
            Floats whole = from_bits(larger(bits(positive) & 0x7f800000, least) + (22 << 23));
            return smaller((positive + whole) - whole, top);
        }
    };

    static Ints code(Floats values) {
        Floats level = Scaled(all(1.0f)).nearest(magnitude(values));
        Ints code = level < 2.0f ? truncated(level) : (bits(level) >> 22) - 254;
        return code | ((values < 0.0f) & (code != 0) & 8);  // minus zero is never written
    }

    static Floats decoded(Ints codes) {
        Ints code = codes & 7;
        Floats level = code < 2 ? to_float(code) : from_bits((code + 254) << 22);
        return codes > 8 ? -level : level;
    }
};

struct MXFP4 {
    static constexpr int ID = 39, SIZE = 32, BYTES = 17;

    // Tries two shared exponents: the one that puts the peak between 4 and 8 (6 is the top), and one more where the
    // peak is then above 6.5, else one less, which suits blocks whose peak has little weight.
    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints peak = bits(unit) >> 23, exponent = all(0);
        Floats largest = magnitude(values[0]);
        for (int i = 1; i < 32; i++) largest = larger(largest, magnitude(values[i]));
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
        bytes[0] = exponent;
        Floats inverse = 1.0f / scale_of(exponent - peak);
        Ints codes[32];
        for (int i = 0; i < 32; i++) codes[i] = Microfloat::code(values[i] * inverse);
        pack<4, 16>(codes, bytes + 1);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints exponent = bytes[0];  // of the scale of undoubled levels; 2^-128 and 2^-127 are subnormal
        Floats scale = from_bits(exponent < 2 ? 0x00200000 << exponent : (exponent - 1) << 23);
        Ints codes[32];
        unpack<4, 16>(bytes + 1, codes);
        for (int i = 0; i < 32; i++) values[i] = scale * Microfloat::decoded(codes[i]);
    }

  private:
    // What a doubled level is worth under a shared exponent relative to the unit's.
    static Floats scale_of(Ints exponent) { return from_bits((exponent + 126) << 23); }
};

extern const Kernel CODEBOOK[] = {kernel<IQ4_NL>(), kernel<IQ4_XS>(), kernel<MXFP4>(), {}};

}  // namespace
