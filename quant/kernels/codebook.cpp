// IQ4_NL and IQ4_XS: codes that index sixteen uneven levels.
#include "feedback.h"
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

    static Ints code_of(Floats level) { return code(level); }

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

struct IQ4_NL : OneScale {
    static constexpr int ID = 20, SIZE = 32, BYTES = 18;
    using Chosen = Single<NonLinear>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[32];
        Floats scale = stored(search_scale<NonLinear, 32>(values, weights, unit), unit);
        Floats product = code_non_linear(values, weights, scale, codes);
        pack_half(half_of(scale * lengthening<32>(values, weights, product * scale), unit), bytes);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<IQ4_NL>(levels, bytes); }
    static void pack_codes(const Ints* codes, Ints* bytes) { pack<4, 16>(codes, bytes + 2); }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[32];
        unpack<4, 16>(bytes + 2, codes);
        Floats scale = unpack_half(bytes);
        for (int i = 0; i < 32; i++) values[i] = scale * NonLinear::decoded(codes[i]);
    }
};

struct IQ4_XS {
    static constexpr int ID = 23, SIZE = 256, BYTES = 136;
    using Chosen = Single<NonLinear>;

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

    static constexpr int SUB_BLOCKS = 8;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        Floats step = unpack_half(bytes);
        for (int i = 0; i < 8; i++) {
            Ints low = bytes[4 + i / 2] >> 4 * (i % 2) & 15, high = bytes[2 + i / 4] >> 2 * (i % 4) & 3;
            scale[i] = step * to_float((low | high << 4) - 32);
            minimum[i] = all(0.0f);
        }
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<IQ4_XS>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        for (int i = 0; i < 8; i++) pack<4, 16>(codes + 32 * i, bytes + 8 + 16 * i);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale[8], minimum[8];
        scales(bytes, scale, minimum);
        for (int i = 0; i < 8; i++) {
            Ints codes[32];
            unpack<4, 16>(bytes + 8 + 16 * i, codes);
            for (int j = 0; j < 32; j++) values[32 * i + j] = scale[i] * NonLinear::decoded(codes[j]);
        }
    }
};

KERNEL_TABLE(CODEBOOK, choosing_kernel<IQ4_NL>(), choosing_kernel<IQ4_XS>())

}  // namespace
