// Normalisation over rows: statistics in double, every output rounded once.
#include "arrays.h"

namespace {

constexpr std::initializer_list<int> DTYPES = {F32, F16, BF16};

struct Rows {
  int64_t count, width;
  Shape statistics;  // shape of what is one number a row
};

// Rows of a tensor whose last dimensions are `normalized`.
Rows rows_of(const aclTensor *x, const Shape &normalized, const char *name) {
  size_t rank = x->shape.size(), last = normalized.size();
  require(last >= 1 && last <= rank, "%s %s for a tensor %s", name, text(normalized).c_str(), text(x->shape).c_str());
  Shape end(x->shape.end() - last, x->shape.end());
  require(end == normalized, "%s %s are not the last sides of %s", name, text(normalized).c_str(),
          text(x->shape).c_str());
  Rows rows{1, elements(normalized), x->shape};
  for (size_t i = 0; i < rank; ++i) {
    if (i + last < rank) rows.count *= x->shape[i];
    else rows.statistics[i] = 1;
  }
  return rows;
}

// Scale and shift: of the input's dtype or float32, both of one dtype.
void require_affine(const aclTensor *x, const aclTensor *weight, const aclTensor *bias, const Shape &shape) {
  for (const aclTensor *tensor : {weight, bias}) {
    if (!tensor) continue;
    require_dtype(tensor, "weight or bias", DTYPES);
    require(tensor->dtype == x->dtype || tensor->dtype == F32, "weight or bias is %s for an input in %s",
            dtype_name(tensor->dtype), dtype_name(x->dtype));
    require_shape(tensor, "weight or bias", shape);
  }
  if (weight && bias) require_same_dtype(weight, bias, "weight and bias");
}

void require_statistics(const aclTensor *tensor, const char *name, const Shape &shape,
                        std::initializer_list<int> dtypes = DTYPES) {
  if (!tensor) return;
  require_dtype(tensor, name, dtypes);
  require_shape(tensor, name, shape);
}

std::vector<float> read_or(const aclTensor *tensor, int64_t count, float otherwise) {
  return tensor ? read<float>(tensor) : std::vector<float>(count, otherwise);
}

// y = (x - mean) * rstd * weight + bias for every row, in place; rms leaves the mean out.
void normalize(std::vector<float> &x, const Rows &rows, const std::vector<float> &weight, const std::vector<float> &bias,
               double eps, bool rms, std::vector<float> &mean, std::vector<float> &rstd) {
  mean.resize(rows.count);
  rstd.resize(rows.count);
  in_parallel(rows.count, 8 * rows.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float *row = &x[i * rows.width];
      double sum = 0, squares = 0;
      for (int64_t j = 0; j < rows.width && !rms; ++j) sum += row[j];
      double centre = sum / rows.width;
      for (int64_t j = 0; j < rows.width; ++j) squares += (row[j] - centre) * (row[j] - centre);
      double scale = 1 / std::sqrt(squares / rows.width + eps);
      for (int64_t j = 0; j < rows.width; ++j)
        row[j] = static_cast<float>((row[j] - centre) * scale * weight[j] + bias[j]);
      mean[i] = static_cast<float>(centre);
      rstd[i] = static_cast<float>(scale);
    }
  });
}

// What a norm's gradients are made from, and where they go; any output may be missing.
struct Backward {
  std::vector<float> x, mean, rstd, weight;
  std::vector<float> dx, dweight, dbias;
};

// dy becomes dx = rstd * (g - mean(g) - x^ mean(g x^)) with g = dy * weight; sums over the rows are in double.
void backward(Backward &given, const std::vector<float> &dy, const Rows &rows, bool rms) {
  int64_t width = rows.width;
  given.dx.resize(dy.size());
  std::vector<double> weight_sum(width), bias_sum(width);
  std::vector<float> unit(given.x);  // x^
  in_parallel(rows.count, 8 * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float *normal = &unit[i * width], *dx = &given.dx[i * width];
      const float *grad = &dy[i * width];
      double plain = 0, along = 0, centre = rms ? 0 : given.mean[i], scale = given.rstd[i];
      for (int64_t j = 0; j < width; ++j) {
        normal[j] = static_cast<float>((normal[j] - centre) * scale);
        double g = double(grad[j]) * given.weight[j];
        plain += g;
        along += g * normal[j];
      }
      plain = rms ? 0 : plain / width;
      along /= width;
      for (int64_t j = 0; j < width; ++j)
        dx[j] = static_cast<float>((double(grad[j]) * given.weight[j] - plain - normal[j] * along) * scale);
    }
  });
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < width; ++j) {
      weight_sum[j] += double(dy[i * width + j]) * unit[i * width + j];
      bias_sum[j] += dy[i * width + j];
    }
  given.dweight.assign(weight_sum.begin(), weight_sum.end());
  given.dbias.assign(bias_sum.begin(), bias_sum.end());
}

void require_mask(const aclBoolArray *mask, std::initializer_list<const aclTensor *> outputs) {
  require(mask && mask->values.size() == 3, "outputMask must have 3 values");
  size_t i = 0;
  for (const aclTensor *output : outputs) {
    require(!mask->values[i] || output, "outputMask asks for output %zu, which is missing", i);
    ++i;
  }
}

Run layer_norm(const aclTensor *x, const aclIntArray *normalized, const aclTensor *weight, const aclTensor *bias,
               double eps, aclTensor *out, aclTensor *mean, aclTensor *rstd) {
  require_dtype(x, "input", DTYPES);
  require_rank(x, "input", 1, 8);
  require(normalized, "normalizedShape is missing");
  Rows rows = rows_of(x, normalized->values, "normalizedShape");
  require_affine(x, weight, bias, normalized->values);
  require_shape(out, "out", x->shape);
  require_same_dtype(x, out, "input and out");
  require_statistics(mean, "meanOut", rows.statistics);
  require_statistics(rstd, "rstdOut", rows.statistics);
  return [=] {
    std::vector<float> values = read<float>(x), means, scales;
    normalize(values, rows, read_or(weight, rows.width, 1), read_or(bias, rows.width, 0), eps, false, means, scales);
    write(out, values);
    if (mean) write(mean, means);
    if (rstd) write(rstd, scales);
  };
}

}  // namespace

KERNEL(aclnnLayerNorm, const aclTensor *x, const aclIntArray *normalized, const aclTensor *weight, const aclTensor *bias,
       double eps, aclTensor *out, aclTensor *mean, aclTensor *rstd) {
  PLAN { return layer_norm(x, normalized, weight, bias, eps, out, mean, rstd); };
}

KERNEL(aclnnLayerNormBackward, const aclTensor *dy, const aclTensor *x, const aclIntArray *normalized,
       const aclTensor *mean, const aclTensor *rstd, const aclTensor *weight, const aclTensor *bias,
       const aclBoolArray *mask, aclTensor *dx, aclTensor *dweight, aclTensor *dbias) {
  PLAN {
    require_dtype(dy, "gradOut", DTYPES);
    require_same_dtype(dy, x, "gradOut and input");
    require_rank(x, "input", 1, 8);
    require_shape(dy, "gradOut", x->shape);
    require(normalized && mean && rstd, "normalizedShape, mean or rstd is missing");
    Rows rows = rows_of(x, normalized->values, "normalizedShape");
    require_affine(x, weight, bias, normalized->values);
    for (const aclTensor *tensor : {mean, rstd}) {
      require_dtype(tensor, "mean or rstd", DTYPES);
      require(tensor->dtype == x->dtype || tensor->dtype == F32, "mean or rstd is %s, narrower than the input",
              dtype_name(tensor->dtype));
      require(elements(tensor) == rows.count, "mean or rstd has the shape %s for %ld rows", text(tensor->shape).c_str(),
              rows.count);
    }
    require_same_dtype(mean, rstd, "mean and rstd");
    require_mask(mask, {dx, dweight, dbias});
    std::vector<uint8_t> wanted = mask->values;
    return [=] {
      Backward given{read<float>(x), read<float>(mean), read<float>(rstd), read_or(weight, rows.width, 1), {}, {}, {}};
      backward(given, read<float>(dy), rows, false);
      if (wanted[0]) write(dx, given.dx);
      if (wanted[1]) write(dweight, given.dweight);
      if (wanted[2]) write(dbias, given.dbias);
    };
  };
}

// The sum of both inputs, and of a bias of either one's shape, is normalised as it is before it is rounded.
KERNEL(aclnnAddLayerNorm, const aclTensor *x1, const aclTensor *x2, const aclTensor *gamma, const aclTensor *beta,
       const aclTensor *bias, double eps, bool with_sum, aclTensor *y, aclTensor *mean, aclTensor *rstd, aclTensor *sum) {
  PLAN {
    for (const aclTensor *tensor : {x1, x2, gamma, beta}) require_dtype(tensor, "x1, x2, gamma or beta", DTYPES);
    require_rank(x1, "x1", 1, 8);
    require_shape(x2, "x2", x1->shape);
    require_shape(beta, "beta", gamma->shape);
    require_same_dtype(gamma, beta, "gamma and beta");
    require(elements(x1) && elements(gamma), "an empty tensor");
    // Halves meet halves of their kind, or one float32 among the inputs makes everything else float32.
    int widest = x1->dtype == x2->dtype ? x1->dtype : F32;
    require(x1->dtype == x2->dtype || x1->dtype == F32 || x2->dtype == F32, "x1 and x2 are %s and %s",
            dtype_name(x1->dtype), dtype_name(x2->dtype));
    require(gamma->dtype == widest || gamma->dtype == F32, "gamma is %s for a sum in %s", dtype_name(gamma->dtype),
            dtype_name(widest));
    Rows rows = rows_of(x1, gamma->shape, "gamma's shape");
    require_shape(y, "yOut", x1->shape);
    require(y->dtype == widest, "yOut is %s instead of %s", dtype_name(y->dtype), dtype_name(widest));
    if (bias) {
      require(bias->shape == x1->shape || bias->shape == gamma->shape, "bias has the shape %s", text(bias->shape).c_str());
      require(bias->dtype == widest, "bias is %s instead of %s", dtype_name(bias->dtype), dtype_name(widest));
    }
    require(mean && rstd, "meanOut or rstdOut is missing");
    require_statistics(mean, "meanOut", rows.statistics, {F32});
    require_statistics(rstd, "rstdOut", rows.statistics, {F32});
    if (with_sum) {
      require(sum, "xOut is missing");
      require_shape(sum, "xOut", x1->shape);
      require(sum->dtype == widest, "xOut is %s instead of %s", dtype_name(sum->dtype), dtype_name(widest));
    }
    return [=] {
      std::vector<float> values = read<float>(x1), other = read<float>(x2), means, scales;
      for (size_t i = 0; i < values.size(); ++i) values[i] += other[i];
      if (bias) {
        other = read<float>(bias, x1->shape);
        for (size_t i = 0; i < values.size(); ++i) values[i] += other[i];
      }
      std::vector<float> kept = with_sum ? values : std::vector<float>();
      normalize(values, rows, read<float>(gamma), read<float>(beta), eps, false, means, scales);
      write(y, values);
      write(mean, means);
      write(rstd, scales);
      if (with_sum) write(sum, kept);
    };
  };
}

KERNEL(aclnnAddLayerNormGrad, const aclTensor *dy, const aclTensor *x1, const aclTensor *x2, const aclTensor *rstd,
       const aclTensor *mean, const aclTensor *gamma, const aclTensor *dsum, aclTensor *dx, aclTensor *dgamma,
       aclTensor *dbeta) {
  PLAN {
    for (const aclTensor *tensor : {dy, x1, x2}) {
      require_dtype(tensor, "dy, x1 or x2", DTYPES);
      require_same_dtype(tensor, dy, "dy, x1 and x2");
      require_shape(tensor, "dy, x1 or x2", dy->shape);
    }
    require_dtype(gamma, "gamma", DTYPES);
    require(gamma->dtype == dy->dtype || gamma->dtype == F32, "gamma is %s for dy in %s", dtype_name(gamma->dtype),
            dtype_name(dy->dtype));
    Rows rows = rows_of(dy, gamma->shape, "gamma's shape");
    require_statistics(rstd, "rstd", rows.statistics, {F32});
    require_statistics(mean, "mean", rows.statistics, {F32});
    require(rstd && mean && dx && dgamma && dbeta, "a tensor is missing");
    if (dsum) require_shape(dsum, "dsum", dy->shape);
    require_shape(dx, "dxOut", dy->shape);
    require_same_dtype(dx, dy, "dxOut and dy");
    for (aclTensor *tensor : {dgamma, dbeta}) {
      require_dtype(tensor, "dgammaOut or dbetaOut", {F32});
      require_shape(tensor, "dgammaOut or dbetaOut", gamma->shape);
    }
    return [=] {
      Backward given{read<float>(x1), read<float>(mean), read<float>(rstd), read<float>(gamma), {}, {}, {}};
      std::vector<float> other = read<float>(x2);
      for (size_t i = 0; i < other.size(); ++i) given.x[i] += other[i];
      backward(given, read<float>(dy), rows, false);
      if (dsum) {
        other = read<float>(dsum);
        for (size_t i = 0; i < other.size(); ++i) given.dx[i] += other[i];
      }
      write(dx, given.dx);
      write(dgamma, given.dweight);
      write(dbeta, given.dbias);
    };
  };
}

KERNEL(aclnnRmsNorm, const aclTensor *x, const aclTensor *gamma, double eps, aclTensor *y, aclTensor *rstd) {
  PLAN {
    require_dtype(x, "x", DTYPES);
    require_rank(x, "x", 1, 8);
    require(gamma && elements(gamma), "gamma is missing or empty");
    require_affine(x, gamma, nullptr, gamma->shape);
    Rows rows = rows_of(x, gamma->shape, "gamma's shape");
    require_shape(y, "yOut", x->shape);
    require_same_dtype(x, y, "x and yOut");
    require_statistics(rstd, "rstdOut", rows.statistics, {F32});
    return [=] {
      std::vector<float> values = read<float>(x), none, scales;
      normalize(values, rows, read<float>(gamma), std::vector<float>(rows.width), eps, true, none, scales);
      write(y, values);
      if (rstd) write(rstd, scales);
    };
  };
}

KERNEL(aclnnRmsNormGrad, const aclTensor *dy, const aclTensor *x, const aclTensor *rstd, const aclTensor *gamma,
       aclTensor *dx, aclTensor *dgamma) {
  PLAN {
    require_dtype(dy, "dy", DTYPES);
    require_same_dtype(dy, x, "dy and x");
    require_rank(x, "x", 2, 8);
    require_shape(dy, "dy", x->shape);
    require(gamma, "gamma is missing");
    require_affine(x, gamma, nullptr, gamma->shape);
    Rows rows = rows_of(x, gamma->shape, "gamma's shape");
    require_dtype(rstd, "rstd", {F32});
    require(elements(rstd) == rows.count, "rstd has the shape %s for %ld rows", text(rstd->shape).c_str(), rows.count);
    require_shape(dx, "dxOut", x->shape);
    require_same_dtype(dx, dy, "dxOut and dy");
    require_dtype(dgamma, "dgammaOut", {F32});
    require_shape(dgamma, "dgammaOut", gamma->shape);
    return [=] {
      Backward given{read<float>(x), {}, read<float>(rstd), read<float>(gamma), {}, {}, {}};
      backward(given, read<float>(dy), rows, true);
      write(dx, given.dx);
      write(dgamma, given.dweight);
    };
  };
}

KERNEL(aclnnAddRmsNorm, const aclTensor *x1, const aclTensor *x2, const aclTensor *gamma, double eps, aclTensor *y,
       aclTensor *rstd, aclTensor *sum) {
  PLAN {
    require_dtype(x1, "x1", DTYPES);
    require_rank(x1, "x1", 1, 8);
    for (const aclTensor *tensor : {x2, gamma, static_cast<const aclTensor *>(y)}) {
      require(tensor, "x2, gamma or yOut is missing");
      require_same_dtype(x1, tensor, "x1, x2, gamma and yOut");
    }
    require_shape(x2, "x2", x1->shape);
    require_shape(y, "yOut", x1->shape);
    require(eps >= 0, "epsilon is %g", eps);
    require(!rstd || sum, "rstdOut without xOut");
    Rows rows = rows_of(x1, gamma->shape, "gamma's shape");
    require_statistics(rstd, "rstdOut", rows.statistics, {F32});
    if (sum) {
      require_shape(sum, "xOut", x1->shape);
      require_same_dtype(sum, x1, "xOut and x1");
    }
    return [=] {
      std::vector<float> values = read<float>(x1), other = read<float>(x2), none, scales;
      for (size_t i = 0; i < values.size(); ++i) values[i] += other[i];
      other = values;
      normalize(values, rows, read<float>(gamma), std::vector<float>(rows.width), eps, true, none, scales);
      write(y, values);
      if (sum) write(sum, other);
      if (rstd) write(rstd, scales);
    };
  };
}
