// Collectives of HCCL, in which every rank of a group takes part.
#include <algorithm>
#include <cstdio>

#include "hccl.h"
#include "trace.h"

namespace {

constexpr int NO_REDUCTION = -1;
constexpr size_t ALIGNMENT = 64;  // of pieces in a chunk
constexpr const char *REDUCTION_NAMES[REDUCTIONS] = {"sum", "prod", "max", "min"};

void check_reduction(int kind, int reduction) {
  demand(reduction >= 0 && reduction < REDUCTIONS, NOT_SUPPORTED, "reduction %d; CANN takes sum, prod, max, min",
         reduction);
  demand(facts(kind).reduces, NOT_SUPPORTED,
         "%s of %s; CANN takes int8, int16, int32, int64, float16, float32, bfloat16", REDUCTION_NAMES[reduction],
         FACTS[kind].name);
  demand(reduction != PRODUCT || (kind != INT16 && kind != BFP16), NOT_SUPPORTED, "prod of %s", FACTS[kind].name);
}

std::string text_of(const Call &call) {
  std::string said = text("%s(count %lu", call.name, call.count);
  if (call.dtype >= 0) said += std::string(", ") + FACTS[call.dtype].name;
  if (call.reduction >= 0) said += std::string(", ") + REDUCTION_NAMES[call.reduction];
  return said + text(", root %u)", call.root);
}

bool same(const Call &a, const Call &b) {
  return !std::strcmp(a.name, b.name) && a.dtype == b.dtype && a.reduction == b.reduction && a.root == b.root &&
         a.count == b.count;
}

// Wait for all ranks and see that they were called with the same.
void agree(SharedGroup &group, const char *name, uint64_t count, int kind, int reduction = NO_REDUCTION,
           uint32_t root = 0) {
  trace_launch(name);
  if (group.failed()) group.barrier(name);  // which tells the reason
  Call &mine = group.state(group.rank).call;
  mine = {{}, kind, reduction, root, count};
  std::snprintf(mine.name, sizeof mine.name, "%s", name);
  group.barrier(name);
  const Call &first = group.state(0).call;
  for (uint32_t rank = 1; rank < group.count; ++rank) {
    const Call &other = group.state(rank).call;
    if (!same(first, other))
      group.end(BAD_PARAMETER, text("ranks do not agree: rank 0 called %s, rank %u called %s", text_of(first).c_str(),
                                    rank, text_of(other).c_str()));
  }
}

size_t piece_bytes(const SharedGroup &group) { return CHUNK / group.count / ALIGNMENT * ALIGNMENT; }

// One piece after the other of `total` bytes: body(start, size).
template <class F>
void in_pieces(size_t total, size_t piece, F body) {
  for (size_t start = 0; start < total; start += piece) body(start, std::min(piece, total - start));
}

// Bytes for and from each rank, as many as each pair agrees on. `sizes` were announced before the ranks agreed.
void exchange(SharedGroup &group, const char *name, const std::vector<const char *> &from,
              const std::vector<char *> &to, const std::vector<uint64_t> &expected) {
  uint32_t count = group.count, rank = group.rank;
  uint64_t longest = 0;
  for (uint32_t i = 0; i < count; ++i) {
    uint64_t sent = group.state(i).sizes[rank];
    if (sent != expected[i])
      group.end(BAD_PARAMETER,
                text("rank %u sends %lu bytes, of which rank %u expects %lu", i, sent, rank, expected[i]));
    for (uint32_t j = 0; j < count; ++j) longest = std::max(longest, group.state(i).sizes[j]);
  }
  size_t piece = piece_bytes(group);
  auto copied = [&](uint64_t size, uint64_t start) -> size_t {
    return size > start ? std::min<uint64_t>(piece, size - start) : 0;
  };
  in_pieces(longest, piece, [&](size_t start, size_t) {
    for (uint32_t i = 0; i < count; ++i)
      if (size_t bytes = copied(group.state(rank).sizes[i], start))
        std::memcpy(group.chunk(rank) + i * piece, from[i] + start, bytes);
    group.barrier(name);
    for (uint32_t i = 0; i < count; ++i)
      if (size_t bytes = copied(expected[i], start)) std::memcpy(to[i] + start, group.chunk(i) + rank * piece, bytes);
    group.barrier(name);
  });
  if (!longest) group.barrier(name);  // so that nobody announces anew what others still read
}

void announce(SharedGroup &group, uint32_t to, uint64_t bytes) {
  if (group.failed()) return;  // others may still read; the next barrier tells
  group.state(group.rank).sizes[to] = bytes;
}

// Each rank reduces its share of a chunk, then those with a `to` collect all shares.
void reduce_all(SharedGroup &group, const char *name, const char *from, char *to, uint64_t count, int kind,
                int reduction) {
  size_t bytes = FACTS[kind].bytes;
  in_pieces(count * bytes, CHUNK, [&](size_t start, size_t size) {
    std::memcpy(group.chunk(group.rank), from + start, size);
    group.barrier(name);
    size_t share = (size / group.count / ALIGNMENT + 1) * ALIGNMENT;
    auto mine = [&](uint32_t rank) { return rank * share < size ? std::min(share, size - rank * share) : 0; };
    size_t offset = group.rank * share;
    std::vector<const char *> shares;
    for (uint32_t i = 0; i < group.count; ++i) shares.push_back(group.chunk(i) + offset);
    reduce(shares, group.chunk(group.rank) + offset, mine(group.rank) / bytes, kind, reduction);
    group.barrier(name);
    for (uint32_t i = 0; to && i < group.count; ++i)
      if (size_t held = mine(i)) std::memcpy(to + start + i * share, group.chunk(i) + i * share, held);
    group.barrier(name);
  });
}

// What one rank has for each of the others, or gets from them, in items.
struct Part { uint64_t count, start; };
using Parts = std::vector<Part>;

void append(Parts &parts, uint64_t count) {
  parts.push_back({count, parts.empty() ? 0 : parts.back().start + parts.back().count});
}

void all_to_all(SharedGroup &group, const char *name, const void *from, const Parts &sent, int send_kind, void *to,
                const Parts &received, int receive_kind) {
  size_t send_item = facts(send_kind).bytes, receive_item = facts(receive_kind).bytes;
  std::vector<const char *> sources;
  std::vector<char *> places;
  std::vector<uint64_t> expected;
  for (uint32_t i = 0; i < group.count; ++i) {
    if (sent[i].count) check(sent[i].count, send_kind, from, "sendBuf");
    if (received[i].count) check(received[i].count, receive_kind, to, "recvBuf");
    sources.push_back(static_cast<const char *>(from) + sent[i].start * send_item);
    places.push_back(static_cast<char *>(to) + received[i].start * receive_item);
    expected.push_back(received[i].count * receive_item);
  }
  demand(!from || from != to, BAD_PARAMETER, "sendBuf and recvBuf are one");
  std::lock_guard<std::mutex> held(group.busy);
  for (uint32_t i = 0; i < group.count; ++i) announce(group, i, sent[i].count * send_item);
  agree(group, name, 0, send_kind);
  exchange(group, name, sources, places, expected);
}

}  // namespace

extern "C" {

// HCCL does nothing, and waits for nobody, where the count is zero.
int HcclBarrier(void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    std::lock_guard<std::mutex> held(group->busy);
    agree(*group, "HcclBarrier", 0, NO_REDUCTION);
    group->barrier("HcclBarrier");
  });
}

int HcclAllReduce(void *from, void *to, uint64_t count, int kind, int reduction, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check(count, kind, from, "sendBuf");
    check(count, kind, to, "recvBuf");
    check_reduction(kind, reduction);
    std::lock_guard<std::mutex> held(group->busy);
    agree(*group, "HcclAllReduce", count, kind, reduction);
    reduce_all(*group, "HcclAllReduce", static_cast<char *>(from), static_cast<char *>(to), count, kind, reduction);
  });
}

int HcclReduce(void *from, void *to, uint64_t count, int kind, int reduction, uint32_t root, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check(count, kind, from, "sendBuf");
    check_rank(*group, root, "root");
    bool first = group->rank == root;
    if (first) check(count, kind, to, "recvBuf");
    check_reduction(kind, reduction);
    std::lock_guard<std::mutex> held(group->busy);
    agree(*group, "HcclReduce", count, kind, reduction, root);
    reduce_all(*group, "HcclReduce", static_cast<char *>(from), first ? static_cast<char *>(to) : nullptr, count, kind,
               reduction);
  });
}

int HcclReduceScatter(void *from, void *to, uint64_t count, int kind, int reduction, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check(count, kind, from, "sendBuf");
    check(count, kind, to, "recvBuf");
    check_reduction(kind, reduction);
    std::lock_guard<std::mutex> held(group->busy);
    agree(*group, "HcclReduceScatter", count, kind, reduction);
    size_t item = FACTS[kind].bytes, piece = piece_bytes(*group), total = count * item;
    in_pieces(total, piece, [&](size_t start, size_t size) {
      std::vector<const char *> shares;
      for (uint32_t i = 0; i < group->count; ++i) {
        std::memcpy(group->chunk(group->rank) + i * piece, static_cast<char *>(from) + i * total + start, size);
        shares.push_back(group->chunk(i) + group->rank * piece);
      }
      group->barrier("HcclReduceScatter");
      reduce(shares, static_cast<char *>(to) + start, size / item, kind, reduction);
      group->barrier("HcclReduceScatter");
    });
  });
}

int HcclAllGather(void *from, void *to, uint64_t count, int kind, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check(count, kind, from, "sendBuf");
    check(count, kind, to, "recvBuf");
    std::lock_guard<std::mutex> held(group->busy);
    agree(*group, "HcclAllGather", count, kind);
    size_t total = count * FACTS[kind].bytes;
    in_pieces(total, CHUNK, [&](size_t start, size_t size) {
      std::memcpy(group->chunk(group->rank), static_cast<char *>(from) + start, size);
      group->barrier("HcclAllGather");
      for (uint32_t i = 0; i < group->count; ++i)
        std::memcpy(static_cast<char *>(to) + i * total + start, group->chunk(i), size);
      group->barrier("HcclAllGather");
    });
  });
}

int HcclBroadcast(void *buffer, uint64_t count, int kind, uint32_t root, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check(count, kind, buffer, "buf");
    check_rank(*group, root, "root");
    std::lock_guard<std::mutex> held(group->busy);
    agree(*group, "HcclBroadcast", count, kind, NO_REDUCTION, root);
    bool first = group->rank == root;
    in_pieces(count * FACTS[kind].bytes, CHUNK, [&](size_t start, size_t size) {
      char *here = static_cast<char *>(buffer) + start;
      if (first) std::memcpy(group->chunk(root), here, size);
      group->barrier("HcclBroadcast");
      if (!first) std::memcpy(here, group->chunk(root), size);
      group->barrier("HcclBroadcast");
    });
  });
}

int HcclScatter(void *from, void *to, uint64_t count, int kind, uint32_t root, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check_rank(*group, root, "root");
    bool first = group->rank == root;
    if (first) check(count, kind, from, "sendBuf");
    check(count, kind, to, "recvBuf");
    std::lock_guard<std::mutex> held(group->busy);
    uint64_t bytes = count * FACTS[kind].bytes;
    std::vector<const char *> sent(group->count);
    std::vector<char *> received(group->count, static_cast<char *>(to));
    std::vector<uint64_t> expected(group->count);
    expected[root] = bytes;
    for (uint32_t i = 0; i < group->count; ++i) {
      announce(*group, i, first ? bytes : 0);
      sent[i] = static_cast<char *>(from) + (first ? i * bytes : 0);
    }
    agree(*group, "HcclScatter", count, kind, NO_REDUCTION, root);
    exchange(*group, "HcclScatter", sent, received, expected);
  });
}

int HcclAlltoAllV(const void *from, const uint64_t *send_counts, const uint64_t *send_starts, int send_kind,
                  void *to, const uint64_t *receive_counts, const uint64_t *receive_starts, int receive_kind,
                  void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    demand(send_counts && send_starts && receive_counts && receive_starts, BAD_POINTER, "counts or offsets are null");
    auto parts = [&](const uint64_t *counts, const uint64_t *starts) {
      Parts made;
      for (uint32_t i = 0; i < group->count; ++i) made.push_back({counts[i], starts[i]});
      return made;
    };
    all_to_all(*group, "HcclAlltoAllV", from, parts(send_counts, send_starts), send_kind, to,
               parts(receive_counts, receive_starts), receive_kind);
  });
}

int HcclAlltoAll(const void *from, uint64_t send_count, int send_kind, void *to, uint64_t receive_count,
                 int receive_kind, void *comm, void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    if (!send_count && !receive_count) return;
    demand(send_count == receive_count && send_kind == receive_kind, BAD_PARAMETER,
           "what is sent and received differs in count or data type");
    Parts parts;
    for (uint32_t i = 0; i < group->count; ++i) parts.push_back({send_count, i * send_count});
    all_to_all(*group, "HcclAlltoAll", from, parts, send_kind, to, parts, receive_kind);
  });
}

// The matrix says how much each rank has for each; everything is packed in the order of the ranks.
int HcclAlltoAllVC(const void *from, const uint64_t *matrix, int send_kind, void *to, int receive_kind, void *comm,
                   void *) {
  return answer(__func__, [&] {
    Group group = group_of(comm);
    demand(matrix, BAD_POINTER, "sendCountMatrix is null");
    Parts sent, received;
    for (uint32_t i = 0; i < group->count; ++i) {
      append(sent, matrix[group->rank * group->count + i]);
      append(received, matrix[i * group->count + group->rank]);
    }
    all_to_all(*group, "HcclAlltoAllVC", from, sent, send_kind, to, received, receive_kind);
  });
}
}
