// FlashAttentionScore: softmax(mask(scale * (query key^T + shift))) value, a block of rows of one head at a time.
#include "attention.h"

namespace {

constexpr int64_t BLOCK = 1 << 20;         // scores at once
constexpr int64_t COMPRESSED = 2048;       // side of the triangle that stands for a larger one
constexpr int64_t STATISTICS = 8;          // times that a row's maximum and sum are written

bool given(const aclTensor *tensor) { return tensor && elements(tensor); }

void require_mask(const Attention &a, const aclTensor *mask, bool inference) {
  if (inference) require_dtype(mask, "attenMask", {BOOL, I8, U8});
  else require_dtype(mask, "attenMask", {BOOL, U8});
  if (a.mode == 2 || a.mode == 3 || a.mode == 4) return require_shape(mask, "attenMask", {COMPRESSED, COMPRESSED});
  if (a.mode == 6) return require_shape(mask, "attenMask", {COMPRESSED + 1024, COMPRESSED});
  const Shape &shape = mask->shape;
  size_t rank = shape.size();
  bool fits = (rank == 2 || rank == 4 || (inference && rank == 3)) && shape[rank - 2] == a.queries &&
              shape[rank - 1] == a.keys;
  if (fits && rank == 3) fits = shape[0] == a.batch || shape[0] == 1;
  if (fits && rank == 4)
    fits = (shape[0] == a.batch && (shape[1] == a.heads || shape[1] == 1)) || (shape[0] == 1 && shape[1] == 1);
  require(fits && (a.mode != 5 || rank == 4), "attenMask has the shape %s in sparse mode %ld", text(shape).c_str(),
          a.mode);
}

void require_shift(const Attention &a, const aclTensor *query, const aclTensor *shift) {
  require_same_dtype(query, shift, "query and realShift");
  require_rank(shift, "realShift", 4, 4);
  const Shape &s = shift->shape;
  bool rows = s[2] == a.queries || (s[2] == 1 && s[0] == a.batch);
  require((s[0] == a.batch || s[0] == 1) && s[1] == a.heads && rows && s[3] == a.keys, "realShift has the shape %s",
          text(s).c_str());
}

// What the kernels of training take.
void require_training(const Attention &a) {
  require(a.width <= 768, "heads of %ld columns; CANN takes 1 to 768", a.width);
  require(a.batch <= 2 << 20, "a batch of %ld; CANN takes 2097152", a.batch);
  require(a.queries <= 1 << 20 && a.keys <= 1 << 20, "%ld and %ld tokens; CANN takes 1048576", a.queries, a.keys);
}

// What the kernels of inference take.
void require_inference(const Attention &a) {
  require(a.layout != "SBH", "inputLayout is SBH; CANN takes BSH, BSND, BNSD here");
  require(a.width <= 512, "heads of %ld columns; CANN takes 1 to 512 here", a.width);
  int64_t most = a.width % 16 || a.value_width % 16 ? 128 : 65536;
  require(a.batch <= most, "a batch of %ld; CANN takes %ld with heads of %ld columns", a.batch, most, a.width);
  require(a.queries <= 20971520 && a.keys <= 20971520, "%ld and %ld tokens; CANN takes 20971520", a.queries, a.keys);
  require(a.layout == "BNSD" || a.heads * a.width < 65535, "%ld columns of all heads; CANN takes less than 65535",
          a.heads * a.width);
  require(a.heads / a.key_heads <= 64, "%ld heads of the query for one of the key; CANN takes 64", a.heads / a.key_heads);
}

}  // namespace

Attention attention_of(const AttentionArguments &g) {
  for (const aclTensor *tensor : {g.query, g.key, g.value}) {
    if (g.inference) require_dtype(tensor, "query, key or value", {F16, BF16});
    else require_dtype(tensor, "query, key or value", {F16, BF16, F32});
    require_same_dtype(g.query, tensor, "query, key and value");
  }
  Attention a{};
  a.layout = g.layout ? g.layout : "";
  size_t rank = a.layout.size();
  bool known = a.layout == "BSH" || a.layout == "SBH" || a.layout == "BSND" || a.layout == "BNSD";
  require(known, "inputLayout is %s; CANN takes BSH, SBH, BSND, BNSD", a.layout.c_str());
  for (const aclTensor *tensor : {g.query, g.key, g.value}) require_rank(tensor, "query, key or value", rank, rank);
  auto side = [&](const aclTensor *tensor, char name) {
    size_t at = a.layout.find(name);
    return at == std::string::npos ? -1 : tensor->shape[at];
  };
  require(g.heads >= 1 && g.heads <= 256, "headNum is %ld; CANN takes 1 to 256", g.heads);
  a.heads = g.heads;
  a.batch = side(g.query, 'B');
  a.queries = side(g.query, 'S');
  a.keys = side(g.key, 'S');
  if (rank == 3) {
    int64_t query = side(g.query, 'H'), key = side(g.key, 'H'), value = side(g.value, 'H');
    require(query > 0 && query % a.heads == 0, "a query of %ld columns for %ld heads", query, a.heads);
    a.width = query / a.heads;
    require(key > 0 && key % a.width == 0, "a key of %ld columns for heads of %ld", key, a.width);
    a.key_heads = key / a.width;
    require(value > 0 && value % a.key_heads == 0, "a value of %ld columns for %ld heads", value, a.key_heads);
    a.value_width = value / a.key_heads;
  } else {
    require(side(g.query, 'N') == a.heads, "headNum is %ld for a query %s", a.heads, text(g.query->shape).c_str());
    a.width = side(g.query, 'D');
    a.key_heads = side(g.key, 'N');
    a.value_width = side(g.value, 'D');
    require(side(g.key, 'D') == a.width, "heads of query and key are %ld and %ld wide", a.width, side(g.key, 'D'));
    require(side(g.value, 'N') == a.key_heads, "key and value have not the same heads");
  }
  require(side(g.key, 'B') == a.batch && side(g.value, 'B') == a.batch, "query, key and value are not of one batch");
  require(side(g.value, 'S') == a.keys, "key and value are %ld and %ld tokens long", a.keys, side(g.value, 'S'));
  require(a.key_heads > 0 && a.heads % a.key_heads == 0, "%ld heads of the query for %ld of the key", a.heads, a.key_heads);
  require(a.width >= 1 && a.value_width <= a.width, "heads of the value are wider than those of the key");
  (g.inference ? require_inference : require_training)(a);
  require(g.keep > 0 && g.keep <= 1, "keepProb is %g", g.keep);
  require(g.keep == 1 && !given(g.drop), "the Ascend host has no dropout in attention");
  require(!given(g.padding), "paddingMask is reserved");
  require(g.precise >= 0 && g.precise <= (g.inference ? 3 : 2), "innerPrecise is %ld", g.precise);
  int64_t modes = g.inference ? 4 : 6;
  require(g.mode >= 0 && g.mode <= modes, "sparseMode is %ld; CANN takes 0 to %ld here", g.mode, modes);
  a.scale = static_cast<float>(g.scale);
  a.mode = g.mode;
  constexpr int64_t FAR = int64_t(1) << 31;  // further than any token
  a.before = std::clamp(g.before, -FAR, FAR);
  a.after = std::clamp(g.after, -FAR, FAR);
  a.drop_empty_rows = g.precise >= 2 || (g.mode == 3 && a.queries > a.keys);
  if (given(g.shift)) {
    require_shift(a, g.query, g.shift);
    a.shift = g.shift;
  }
  if (given(g.mask)) {  // without it the mode and the tokens do not count
    require_mask(a, g.mask, g.inference);
    a.mask = g.mask;
    require(g.mode != 4 || a.before + a.after >= 0, "preTokens and nextTokens have nothing between them");
    if (g.mode >= 5) {
      require(g.prefix && static_cast<int64_t>(g.prefix->values.size()) == a.batch && a.batch <= 2048,
              "prefix must have one number for each of at most 2048 images");
      a.prefix = g.prefix->values;
      int64_t least = a.queries > a.keys ? 0 : a.keys - a.queries;
      for (int64_t number : a.prefix)
        require(number >= least && number <= a.keys, "a prefix of %ld; CANN takes %ld to %ld", number, least, a.keys);
    }
  }
  return a;
}

int64_t Attention::block() const {
  return std::max<int64_t>(1, std::min(queries, BLOCK / std::max<int64_t>(keys, 1)));
}

Shape layout_shape(const std::string &layout, int64_t batch, int64_t heads, int64_t sequence, int64_t width) {
  if (layout == "BSH") return {batch, sequence, heads * width};
  if (layout == "SBH") return {sequence, batch, heads * width};
  if (layout == "BSND") return {batch, sequence, heads, width};
  return {batch, heads, sequence, width};
}

aclTensor head_of(const aclTensor *tensor, const std::string &layout, int64_t heads, int64_t batch, int64_t head) {
  size_t rows = layout.find('S'), last = tensor->shape.size() - 1, of_heads = layout.find('N');
  int64_t column = tensor->strides[last], width = tensor->shape[last] / (last == 2 ? heads : 1);
  int64_t step = last == 2 ? width * column : tensor->strides[of_heads];
  return view(tensor, {tensor->shape[rows], width}, {tensor->strides[rows], column},
              tensor->offset + batch * tensor->strides[layout.find('B')] + head * step);
}

namespace {

// Where a mask of any mode hides keys; `hidden` gets 1 there.
void hide(const Attention &a, int64_t batch, int64_t head, int64_t first, int64_t rows, std::vector<uint8_t> &hidden) {
  hidden.assign(rows * a.keys, 0);
  if (a.mode <= 1 || a.mode == 5) {
    const aclTensor *mask = a.mask;
    const uint8_t *items = reinterpret_cast<const uint8_t *>(mask->data) + mask->offset;
    size_t rank = mask->shape.size();
    if (rank > 2) items += (mask->shape[0] == 1 ? 0 : batch) * mask->strides[0];
    if (rank == 4) items += (mask->shape[1] == 1 ? 0 : head) * mask->strides[1];
    int64_t down = mask->strides[rank - 2], along = mask->strides[rank - 1];
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < a.keys; ++j) hidden[i * a.keys + j] = items[(first + i) * down + j * along] != 0;
    if (a.mode != 0) return;
  }
  // The diagonal begins at the left upper corner in modes 0 and 2, ends at the right lower one in the others.
  int64_t shift = a.mode == 0 || a.mode == 2 ? 0 : a.keys - a.queries;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t diagonal = first + i + shift, begin = 0, end = diagonal + 1;
    if (a.mode == 0 || a.mode == 4) {
      begin = diagonal - a.before;
      end = diagonal + 1 + a.after;
    }
    if (a.mode == 6) end = std::max(end, a.prefix[batch]);
    for (int64_t j = 0; j < a.keys; ++j)
      if (j < begin || j >= end) hidden[i * a.keys + j] = 1;
  }
}

}  // namespace

void scores(const Attention &a, int64_t batch, int64_t head, int64_t first, int64_t rows, const float *query,
            const float *key, std::vector<float> &result) {
  result.resize(rows * a.keys);
  float beta = 0;
  if (a.shift) {
    const aclTensor *s = a.shift;
    int64_t offset = s->offset + (s->shape[0] == 1 ? 0 : batch) * s->strides[0] + head * s->strides[1];
    int64_t down = s->shape[2] == 1 ? 0 : s->strides[2];
    aclTensor own = view(s, {rows, a.keys}, {down, s->strides[3]}, offset + first * down);
    result = read<float>(&own);
    beta = a.scale;
  }
  multiply(false, true, rows, a.keys, a.width, a.scale, query + first * a.width, key, beta, result.data());
  if (!a.mask) return;
  std::vector<uint8_t> hidden;
  hide(a, batch, head, first, rows, hidden);
  for (size_t i = 0; i < result.size(); ++i)
    if (hidden[i]) result[i] = LOWEST;
}

// A polynomial that the compiler makes vectors of; to two last places.
__attribute__((optimize("O3"))) double exponentials(float *row, int64_t count, float top) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number
  for (int64_t j = 0; j < count; ++j) {
    float x = row[j] - top;
    x = x > -87.0f ? x : (x == x ? -87.0f : x);
    float whole = (x * 1.44269504088896341f + ROUND) - ROUND;
    float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    row[j] = row[j] - top < -87.0f ? 0.0f : p * power;
  }
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += row[j];
  return sum;
}

void attend(const Attention &all, const aclTensor *query, const aclTensor *key, const aclTensor *value, aclTensor *out,
            const std::string &out_layout, std::vector<float> *tops, std::vector<float> *sums) {
  in_parallel(all.batch * all.heads, all.queries * all.keys * all.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t image = i / all.heads, head = i % all.heads, key_head = all.key_head(head);
      Attention a = all;
      if (!all.query_lengths.empty()) a.queries = all.query_lengths[image];
      if (!all.key_lengths.empty()) a.keys = all.key_lengths[image];
      aclTensor q_head = head_of(query, a.layout, a.heads, image, head);
      aclTensor k_head = head_of(key, a.layout, a.key_heads, image, key_head);
      aclTensor v_head = head_of(value, a.layout, a.key_heads, image, key_head);
      aclTensor o_head = head_of(out, out_layout, a.heads, image, head);
      std::vector<float> q = read<float>(&q_head), k = read<float>(&k_head), v = read<float>(&v_head), block;
      std::vector<float> result(all.queries * a.value_width);
      for (int64_t first = 0; first < a.queries; first += a.block()) {
        int64_t count = std::min(a.block(), a.queries - first);
        scores(a, image, head, first, count, q.data(), k.data(), block);
        for (int64_t r = 0; r < count; ++r) {
          float *row = &block[r * a.keys];
          float top = a.keys ? *std::max_element(row, row + a.keys) : LOWEST;
          double sum = exponentials(row, a.keys, top);
          bool empty = a.drop_empty_rows && top == LOWEST;
          float factor = empty || !sum ? 0.0f : static_cast<float>(1 / sum);
          for (int64_t j = 0; j < a.keys; ++j) row[j] *= factor;
          if (tops) (*tops)[i * all.queries + first + r] = top;
          if (sums) (*sums)[i * all.queries + first + r] = static_cast<float>(sum);
        }
        multiply(false, false, count, a.value_width, a.keys, 1.0f, block.data(), v.data(), 0.0f,
                 &result[first * a.value_width]);
      }
      write(&o_head, result);
    }
  });
}

KERNEL(aclnnFlashAttentionScore, const aclTensor *query, const aclTensor *key, const aclTensor *value,
       const aclTensor *shift, const aclTensor *drop, const aclTensor *padding, const aclTensor *mask,
       const aclIntArray *prefix, double scale, double keep, int64_t before, int64_t after, int64_t heads, char *layout,
       int64_t precise, int64_t mode, aclTensor *top_out, aclTensor *sum_out, aclTensor *, aclTensor *out) {
  PLAN {
    Attention a = attention_of({query, key, value, shift, drop, padding, mask, prefix, scale, keep, before, after, heads,
                                layout, precise, mode});
    Shape rows{a.batch, a.heads, a.queries, STATISTICS};
    for (const aclTensor *tensor : {top_out, sum_out}) {
      require_dtype(tensor, "softmaxMax or softmaxSum", {F32});
      require_shape(tensor, "softmaxMax or softmaxSum", rows);
    }
    require(out, "attentionOut is missing");
    require_same_dtype(query, out, "query and attentionOut");
    require_shape(out, "attentionOut", layout_shape(a.layout, a.batch, a.heads, a.queries, a.value_width));
    return [=] {
      std::vector<float> tops(a.batch * a.heads * a.queries), sums(tops.size());
      attend(a, query, key, value, out, a.layout, &tops, &sums);
      auto spread = [&](const std::vector<float> &numbers, aclTensor *to) {
        std::vector<float> wide(numbers.size() * STATISTICS);
        for (size_t i = 0; i < wide.size(); ++i) wide[i] = numbers[i / STATISTICS];
        write(to, wide);
      };
      spread(tops, top_out);
      spread(sums, sum_out);
    };
  };
}
