// TQ1_0, TQ2_0, Q1_0 and Q2_0: one or two bits around a single scale.
#include "feedback.h"
#include "packing.h"
#include "scaled.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// The peak of weights that have so few levels already is at the outermost; otherwise large values are best cut off.
struct Ternary : Uniform<-1, 1> {
    static constexpr float PEAKS[] = {1.0f, 4.2f, 9.8f, 2.6f, 1.6f, 3.3f, 6.0f};
};

struct TwoBits : Uniform<-1, 2> {
    static constexpr float PEAKS[] = {2.0f, 1.0f, 3.2f, -4.6f, 6.5f, 2.2f, -2.8f, 4.1f, -12.0f};
};

template <class Levels, int SIZE> struct Coder {
    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* scale, Ints* codes) {
        Ints half = search_scale<Levels, SIZE>(values, weights, unit);
        pack_half(half, scale);
        Floats inverse = reciprocal(stored(half, unit));
        for (int i = 0; i < SIZE; i++) codes[i] = Levels::code(values[i] * inverse);
    }

    static void decode(const Ints* scale, const Ints* codes, Floats* values) {
        Floats step = unpack_half(scale);
        for (int i = 0; i < SIZE; i++) values[i] = step * (to_float(codes[i]) - 1.0f);
    }
};

// A byte holds five base-3 digits, the first in the highest place, as a fraction of 256 rounded up.
struct TQ1_0 {
    static constexpr int ID = 34, SIZE = 256, BYTES = 54;
    using Codes = Coder<Ternary, SIZE>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[SIZE];
        Codes::encode(values, weights, unit, bytes + 52, codes);
        pack_digits<32, 5>(codes, bytes);
        pack_digits<16, 5>(codes + 160, bytes + 32);
        pack_digits<4, 4>(codes + 240, bytes + 48);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[SIZE];
        unpack_digits<32, 5>(bytes, codes);
        unpack_digits<16, 5>(bytes + 32, codes + 160);
        unpack_digits<4, 4>(bytes + 48, codes + 240);
        Codes::decode(bytes + 52, codes, values);
    }

  private:
    template <int COUNT, int DIGITS> static void pack_digits(const Ints* codes, Ints* bytes) {
        for (int i = 0; i < COUNT; i++) {
            Ints number = all(0);
            for (int place = 0; place < 5; place++)
                number = number * 3 + (place < DIGITS ? codes[i + COUNT * place] : all(0));
            bytes[i] = (number * 256 + 242) * 8631 >> 21;  // a division by 243, of numbers as small as these
        }
    }

    // The first digit of a fraction is what tripling it carries over.
    template <int COUNT, int DIGITS> static void unpack_digits(const Ints* bytes, Ints* codes) {
        for (int i = 0; i < COUNT; i++) {
            Ints fraction = bytes[i];
            for (int place = 0; place < DIGITS; place++) {
                codes[i + COUNT * place] = fraction * 3 >> 8;
                fraction = fraction * 3 & 255;
            }
        }
    }
};

struct TQ2_0 {
    static constexpr int ID = 35, SIZE = 256, BYTES = 66;
    using Codes = Coder<Ternary, SIZE>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[SIZE];
        Codes::encode(values, weights, unit, bytes + 64, codes);
        for (int i = 0; i < 2; i++) pack<2, 32>(codes + 128 * i, bytes + 32 * i);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[SIZE];
        for (int i = 0; i < 2; i++) unpack<2, 32>(bytes + 32 * i, codes + 128 * i);
        Codes::decode(bytes + 64, codes, values);
    }
};

struct Q1_0 {
    static constexpr int ID = 41, SIZE = 128, BYTES = 18;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Floats total = ordered_sum<SIZE>([&](int i) { return weights.times(i, magnitude(values[i])); });
        Floats count = ordered_sum<SIZE>([&](int i) { return weights.times(i, all(1.0f)); });
        pack_half(half_of(total * reciprocal(count), unit), bytes);
        for (int i = 0; i < 16; i++)
            pack_each<1, 1>([&](int bit) { return (values[8 * i + bit] >= 0.0f) & 1; }, bytes + 2 + i);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats scale = unpack_half(bytes);
        for (int i = 0; i < SIZE; i++) values[i] = scale * to_float((bytes[2 + i / 8] >> i % 8 & 1) * 2 - 1);
    }
};

struct Q2_0 : OneScale {
    static constexpr int ID = 42, SIZE = 64, BYTES = 18;
    using Chosen = Single<Uniform<-1, 2>>;
    using Codes = Coder<TwoBits, SIZE>;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Ints codes[SIZE];
        Codes::encode(values, weights, unit, bytes, codes);
        pack_codes(codes, bytes);
    }

    static void put_levels(const Floats* levels, Ints* bytes) { put_codes<Q2_0>(levels, bytes); }

    static void pack_codes(const Ints* codes, Ints* bytes) {
        for (int i = 0; i < 16; i++) pack<2, 1>(codes + 4 * i, bytes + 2 + i);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints codes[SIZE];
        for (int i = 0; i < 16; i++) unpack<2, 1>(bytes + 2 + i, codes + 4 * i);
        Codes::decode(bytes, codes, values);
    }
};

KERNEL_TABLE(TERNARY, kernel<TQ1_0>(), kernel<TQ2_0>(), kernel<Q1_0>(), choosing_kernel<Q2_0>())

}  // namespace
