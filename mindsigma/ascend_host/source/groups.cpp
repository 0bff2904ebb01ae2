// GroupNorm, plain and with SiLU: statistics of a group of channels in double, every output rounded once.
#include "arrays.h"

namespace {

constexpr std::initializer_list<int> DTYPES = {F32, F16, BF16};

struct Groups {
  int64_t images, channels, pixels, count;  // count: groups of an image
  int64_t width() const { return channels / count * pixels; }
};

void require_groups(const Groups &groups) {
  require(groups.count > 0 && groups.channels % groups.count == 0, "%ld channels do not fall into %ld groups",
          groups.channels, groups.count);
}

Groups groups_of(const aclTensor *x, int64_t count) {
  require_rank(x, "self", 2, 8);
  Groups groups{x->shape[0], x->shape[1], 1, count};
  for (size_t i = 2; i < x->shape.size(); ++i) groups.pixels *= x->shape[i];
  require_groups(groups);
  return groups;
}

std::vector<float> read_or(const aclTensor *tensor, int64_t count, float otherwise) {
  return tensor ? read<float>(tensor) : std::vector<float>(count, otherwise);
}

Run group_norm(const aclTensor *x, const aclTensor *gamma, const aclTensor *beta, const Groups &groups, double eps,
               aclTensor *out, aclTensor *mean, aclTensor *rstd, bool silu) {
  require(eps > 0, "eps is %g", eps);
  require_shape(out, "out", x->shape);
  require_same_dtype(x, out, "self and out");
  for (const aclTensor *tensor : {gamma, beta})
    if (tensor) require_shape(tensor, "gamma or beta", {groups.channels});
  for (const aclTensor *tensor : {mean, rstd}) {
    require_dtype(tensor, "meanOut or rstdOut", DTYPES);
    require_shape(tensor, "meanOut or rstdOut", {groups.images, groups.count});
  }
  return [=] {
    std::vector<float> values = read<float>(x);
    std::vector<float> scale = read_or(gamma, groups.channels, 1), shift = read_or(beta, groups.channels, 0);
    std::vector<float> means(groups.images * groups.count), scales(means.size());
    int64_t width = groups.width(), own = groups.channels / groups.count;
    in_parallel(means.size(), 8 * width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float *group = &values[i * width];
        double sum = 0, squares = 0;
        for (int64_t j = 0; j < width; ++j) sum += group[j];
        double centre = sum / width;
        for (int64_t j = 0; j < width; ++j) squares += (group[j] - centre) * (group[j] - centre);
        double inverse = 1 / std::sqrt(squares / width + eps);
        for (int64_t c = 0; c < own; ++c) {
          int64_t channel = i % groups.count * own + c;
          double factor = inverse * scale[channel], added = shift[channel] - centre * factor;
          float *row = group + c * groups.pixels;
          for (int64_t j = 0; j < groups.pixels; ++j) row[j] = static_cast<float>(row[j] * factor + added);
          if (silu)
            for (int64_t j = 0; j < groups.pixels; ++j) row[j] = row[j] / (1.0f + std::exp(-row[j]));
        }
        means[i] = static_cast<float>(centre);
        scales[i] = static_cast<float>(inverse);
      }
    });
    write(out, values);
    write(mean, means);
    write(rstd, scales);
  };
}

}  // namespace

KERNEL(aclnnGroupNorm, const aclTensor *x, const aclTensor *gamma, const aclTensor *beta, int64_t images,
       int64_t channels, int64_t pixels, int64_t count, double eps, aclTensor *out, aclTensor *mean, aclTensor *rstd) {
  PLAN {
    require_dtype(x, "self", DTYPES);
    Groups groups = groups_of(x, count);
    require(groups.images == images && groups.channels == channels && groups.pixels == pixels,
            "N, C, HxW are %ld, %ld, %ld for self %s", images, channels, pixels, text(x->shape).c_str());
    for (const aclTensor *tensor : {gamma, beta, static_cast<const aclTensor *>(mean), static_cast<const aclTensor *>(rstd)})
      if (tensor) require_same_dtype(x, tensor, "self and gamma, beta, meanOut, rstdOut");
    return group_norm(x, gamma, beta, groups, eps, out, mean, rstd, false);
  };
}

KERNEL(aclnnGroupNormSilu, const aclTensor *x, const aclTensor *gamma, const aclTensor *beta, int64_t count, double eps,
       aclTensor *out, aclTensor *mean, aclTensor *rstd) {
  PLAN {
    require_dtype(x, "self", DTYPES);
    Groups groups = groups_of(x, count);
    for (const aclTensor *tensor : {gamma, beta})
      if (tensor)
        require(tensor->dtype == x->dtype || tensor->dtype == F32, "gamma or beta is %s for self in %s",
                dtype_name(tensor->dtype), dtype_name(x->dtype));
    return group_norm(x, gamma, beta, groups, eps, out, mean, rstd, true);
  };
}

KERNEL(aclnnGroupNormBackward, const aclTensor *dy, const aclTensor *x, const aclTensor *mean, const aclTensor *rstd,
       const aclTensor *gamma, int64_t images, int64_t channels, int64_t pixels, int64_t count, const aclBoolArray *mask,
       aclTensor *dx, aclTensor *dgamma, aclTensor *dbeta) {
  PLAN {
    require_dtype(dy, "gradOut", DTYPES);
    require(x && mean && rstd, "input, mean or rstd is missing");
    Groups groups{images, channels, pixels, count};
    require_groups(groups);
    require(channels <= 240000 && channels / count <= 8000, "%ld channels in %ld groups; CANN takes 240000, 8000 a group",
            channels, count);
    require(elements(x) == images * channels * pixels && elements(dy) == elements(x), "input %s is not of N, C, HxW",
            text(x->shape).c_str());
    for (const aclTensor *tensor : {x, mean, rstd, gamma})
      if (tensor) require_same_dtype(dy, tensor, "gradOut and input, mean, rstd, gamma");
    require(elements(mean) == images * count && elements(rstd) == images * count, "mean or rstd is not (N, group)");
    require(!gamma || elements(gamma) == channels, "gamma has the shape %s", gamma ? text(gamma->shape).c_str() : "");
    require(mask && mask->values.size() == 3, "outputMask must have 3 values");
    std::vector<uint8_t> wanted = mask->values;
    require((!wanted[0] || dx) && (!wanted[1] || dgamma) && (!wanted[2] || dbeta), "an output that is asked for is missing");
    if (wanted[0]) require_shape(dx, "gradInput", x->shape);
    return [=] {
      std::vector<float> grad = read<float>(dy), values = read<float>(x), scale = read_or(gamma, channels, 1);
      std::vector<float> means = read<float>(mean), inverses = read<float>(rstd);
      // Of every channel of every image: sums of dy x^ and of dy.
      std::vector<double> along(images * channels), plain(images * channels);
      int64_t own = channels / count, width = groups.width();
      in_parallel(images * count, 8 * width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          double centre = means[i], inverse = inverses[i], mean_along = 0, mean_plain = 0;
          for (int64_t c = 0; c < own; ++c) {
            int64_t row = i * own + c;
            for (int64_t j = row * pixels; j < (row + 1) * pixels; ++j) {
              values[j] = static_cast<float>((values[j] - centre) * inverse);
              along[row] += double(grad[j]) * values[j];
              plain[row] += grad[j];
            }
            mean_along += along[row] * scale[row % channels] / width;
            mean_plain += plain[row] * scale[row % channels] / width;
          }
          for (int64_t row = i * own; row < (i + 1) * own; ++row)
            for (int64_t j = row * pixels; j < (row + 1) * pixels; ++j)
              values[j] = static_cast<float>(
                  (double(grad[j]) * scale[row % channels] - mean_plain - values[j] * mean_along) * inverse);
        }
      });
      auto over_images = [&](const std::vector<double> &sums) {
        std::vector<double> total(channels);
        for (size_t i = 0; i < sums.size(); ++i) total[i % channels] += sums[i];
        return total;
      };
      if (wanted[0]) write(dx, values);
      if (wanted[1]) write(dgamma, over_images(along));
      if (wanted[2]) write(dbeta, over_images(plain));
    };
  };
}
