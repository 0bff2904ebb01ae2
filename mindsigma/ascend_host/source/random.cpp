// Random numbers of a seed and an offset. What the device's own unit draws is not published: this is Philox 4x32-10 with
// the seed as key, so that a seed gives the same numbers here again, though not those of an NPU.
#include <atomic>

#include "legacy.h"
#include "mapping.h"

namespace {

struct Four { uint32_t words[4]; };

Four philox(uint64_t seed, uint64_t offset, uint64_t number) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  Four block{{static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(offset),
              static_cast<uint32_t>(offset >> 32)}};
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t(0xD2511F53) * block.words[0], b = uint64_t(0xCD9E8D57) * block.words[2];
    block = {{static_cast<uint32_t>(b >> 32) ^ block.words[1] ^ key[0], static_cast<uint32_t>(b),
              static_cast<uint32_t>(a >> 32) ^ block.words[3] ^ key[1], static_cast<uint32_t>(a)}};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return block;
}

// Numbers in [0, 1), 24 bits each.
std::vector<float> uniform(int64_t count, uint64_t seed, uint64_t offset) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; i += 4) {
    Four drawn = philox(seed, offset, i / 4);
    for (int64_t j = i; j < std::min(i + 4, count); ++j) values[j] = (drawn.words[j - i] >> 8) * 0x1p-24f;
  }
  return values;
}

// Numbers of the normal distribution, by Box and Muller.
std::vector<float> normal(int64_t count, uint64_t seed, uint64_t offset) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; i += 4) {
    Four drawn = philox(seed, offset, i / 4);
    for (int64_t j = i; j < std::min(i + 4, count); ++j) {
      uint32_t first = drawn.words[(j - i) & ~1], second = drawn.words[((j - i) & ~1) + 1];
      double radius = std::sqrt(-2 * std::log((first + 1.0) * 0x1p-32)), angle = second * (2 * M_PI * 0x1p-32);
      values[j] = static_cast<float>(radius * ((j - i) & 1 ? std::sin(angle) : std::cos(angle)));
    }
  }
  return values;
}

Run draw_normal(const aclTensor *mean, const aclTensor *spread, float constant_mean, float constant_spread, int64_t seed,
                int64_t offset, const aclTensor *out) {
  require_dtype(out, "out", REALS);
  require(spread || constant_spread >= 0, "std is %g", constant_spread);
  for (const aclTensor *tensor : {mean, spread})
    if (tensor) require_dtype(tensor, "mean or std", REALS);
  Shape shape = broadcast(mean ? mean->shape : Shape(), spread ? spread->shape : Shape());
  if (mean || spread) require_shape(out, "out", shape);
  return [=] {
    std::vector<float> values = normal(elements(out), seed, offset);
    std::vector<float> means = mean ? read<float>(mean, out->shape) : std::vector<float>();
    std::vector<float> spreads = spread ? read<float>(spread, out->shape) : std::vector<float>();
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = (mean ? means[i] : constant_mean) + values[i] * (spread ? spreads[i] : constant_spread);
    write(const_cast<aclTensor *>(out), values);
  };
}

}  // namespace

KERNEL(aclnnInplaceNormal, const aclTensor *self, float mean, float spread, int64_t seed, int64_t offset) {
  PLAN { return draw_normal(nullptr, nullptr, mean, spread, seed, offset, self); };
}
KERNEL(aclnnNormalFloatFloat, float mean, float spread, int64_t seed, int64_t offset, aclTensor *out) {
  PLAN { return draw_normal(nullptr, nullptr, mean, spread, seed, offset, out); };
}
KERNEL(aclnnNormalFloatTensor, float mean, const aclTensor *spread, int64_t seed, int64_t offset, aclTensor *out) {
  PLAN { return draw_normal(nullptr, spread, mean, 0, seed, offset, out); };
}
KERNEL(aclnnNormalTensorFloat, const aclTensor *mean, float spread, int64_t seed, int64_t offset, aclTensor *out) {
  PLAN { return draw_normal(mean, nullptr, 0, spread, seed, offset, out); };
}
KERNEL(aclnnNormalTensorTensor, const aclTensor *mean, const aclTensor *spread, int64_t seed, int64_t offset,
       aclTensor *out) {
  PLAN { return draw_normal(mean, spread, 0, 0, seed, offset, out); };
}

KERNEL(aclnnInplaceUniform, const aclTensor *self, double from, double to, uint64_t seed, uint64_t offset) {
  PLAN {
    require_dtype(self, "selfRef", NUMBERS);
    require(from <= to, "from %g to %g", from, to);
    return [=] {
      std::vector<float> values = uniform(elements(self), seed, offset);
      for (float &value : values) value = static_cast<float>(from + (to - from) * value);
      write(const_cast<aclTensor *>(self), values);
    };
  };
}

KERNEL(aclnnInplaceRandom, const aclTensor *self, int64_t from, int64_t to, int64_t seed, int64_t offset) {
  PLAN {
    require_dtype(self, "selfRef", NUMBERS_AND_BOOL);
    require(from < to, "from %ld to %ld", from, to);
    return [=] {
      std::vector<int64_t> values(elements(self));
      for (size_t i = 0; i < values.size(); ++i) {
        Four drawn = philox(seed, offset, i);
        uint64_t wide = uint64_t(drawn.words[0]) << 32 | drawn.words[1];
        values[i] = from + static_cast<int64_t>(wide % (static_cast<uint64_t>(to) - static_cast<uint64_t>(from)));
      }
      write(const_cast<aclTensor *>(self), values);
    };
  };
}

KERNEL(aclnnRandperm, int64_t count, int64_t seed, int64_t offset, aclTensor *out) {
  PLAN {
    require_dtype(out, "out", NUMBERS);
    require_shape(out, "out", {count});
    return [=] {
      std::vector<int64_t> order(count);
      for (int64_t i = 0; i < count; ++i) order[i] = i;
      for (int64_t i = count - 1; i > 0; --i) std::swap(order[i], order[philox(seed, offset, i).words[0] % (i + 1)]);
      write(out, order);
    };
  };
}

// The older operators keep a state: every launch draws on.
namespace {
uint64_t next_offset() {
  static std::atomic<uint64_t> launches{0};
  return launches++;
}
uint64_t seed_of(const Attributes &attributes) {
  return static_cast<uint64_t>(attributes.number("seed", 0)) << 32 ^ static_cast<uint64_t>(attributes.number("seed2", 0));
}
}  // namespace

LEGACY(RandomStandardNormal) {
  write(&outputs[0], normal(elements(&outputs[0]), seed_of(attributes), next_offset()));
}
LEGACY(RandomUniform) { write(&outputs[0], uniform(elements(&outputs[0]), seed_of(attributes), next_offset())); }
