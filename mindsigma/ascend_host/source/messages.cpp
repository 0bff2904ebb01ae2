// Messages of HCCL from one rank to another. Send waits for its Recv, as HCCL's does.
#include <algorithm>

#include "hccl.h"
#include "trace.h"

namespace {

// A message between two ranks.
struct Transfer {
  bool sends;
  char *data;
  uint64_t count;
  int kind;
  uint32_t remote;
  size_t moved = 0;
  bool done = false;
  size_t bytes() const { return count * FACTS[kind].bytes; }
};

// Move a piece if the other side is ready. A message was sent when its last piece was taken.
bool advance(SharedGroup &group, Transfer &transfer) {
  uint32_t from = transfer.sends ? group.rank : transfer.remote, to = transfer.sends ? transfer.remote : group.rank;
  Pair &pair = group.pair(from, to);
  if (pair.full != !transfer.sends) return false;
  if (transfer.sends) {
    if (transfer.moved == transfer.bytes()) return transfer.done = true;
    pair.bytes = std::min(PAIR_CHUNK, transfer.bytes() - transfer.moved);
    pair.count = transfer.count;
    pair.dtype = transfer.kind;
    std::memcpy(group.pair_chunk(from, to), transfer.data + transfer.moved, pair.bytes);
  } else {
    if (pair.count != transfer.count || pair.dtype != transfer.kind)
      group.end(BAD_PARAMETER, text("rank %u sends %lu of %s, of which rank %u receives %lu of %s", from, pair.count,
                                    FACTS[pair.dtype].name, to, transfer.count, FACTS[transfer.kind].name));
    std::memcpy(transfer.data + transfer.moved, group.pair_chunk(from, to), pair.bytes);
  }
  transfer.moved += pair.bytes;
  transfer.done = !transfer.sends && transfer.moved == transfer.bytes();
  pair.full = transfer.sends;
  group.ring(transfer.remote);
  return true;
}

// All of them at once; those of one pair and direction in their order.
void move(SharedGroup &group, const char *name, std::vector<Transfer> &transfers, bool only_send = false) {
  trace_launch(name);
  std::vector<uint32_t> peers;
  auto done = [&] {
    bool moved = true;
    while (moved) {
      moved = false;
      peers.clear();
      std::vector<char> taken(2 * group.count);
      for (Transfer &transfer : transfers) {
        char &busy = taken[2 * transfer.remote + transfer.sends];
        if (transfer.done || busy) continue;
        busy = 1;
        moved = advance(group, transfer) || moved;
        if (transfer.remote != group.rank) peers.push_back(transfer.remote);
      }
    }
    if (only_send && !transfers[0].done) {
      uint32_t remote = transfers[0].remote;
      if (group.state(remote).sending_to == group.rank + 1 && group.pair(remote, group.rank).full &&
          group.pair(group.rank, remote).full)
        group.end(BAD_PARAMETER, text("ranks %u and %u both send first, and each waits for the other's Recv",
                                      std::min(remote, group.rank), std::max(remote, group.rank)));
    }
    return std::all_of(transfers.begin(), transfers.end(), [](const Transfer &transfer) { return transfer.done; });
  };
  group.state(group.rank).sending_to = only_send ? transfers[0].remote + 1 : 0;
  group.wait(name, peers, done);
  group.state(group.rank).sending_to = 0;
}

int move_one(const char *name, bool sends, void *buffer, uint64_t count, int kind, uint32_t remote, void *comm) {
  return answer(name, [&] {
    Group group = group_of(comm);
    if (!count) return;
    check(count, kind, buffer, sends ? "sendBuf" : "recvBuf");
    check_rank(*group, remote, sends ? "destRank" : "srcRank");
    demand(remote != group->rank, BAD_PARAMETER, "a rank that waits for itself");
    std::lock_guard<std::mutex> held(group->busy);
    std::vector<Transfer> transfers{{sends, static_cast<char *>(buffer), count, kind, remote}};
    move(*group, name, transfers, sends);
  });
}

}  // namespace

extern "C" {

int HcclSend(void *buffer, uint64_t count, int kind, uint32_t to, void *comm, void *) {
  return move_one(__func__, true, buffer, count, kind, to, comm);
}
int HcclRecv(void *buffer, uint64_t count, int kind, uint32_t from, void *comm, void *) {
  return move_one(__func__, false, buffer, count, kind, from, comm);
}

struct HcclSendRecvItem {
  int type;  // 0 sends, 1 receives
  void *buffer;
  uint64_t count;
  int kind;
  uint32_t remote;
};
int HcclBatchSendRecv(const HcclSendRecvItem *items, uint32_t number, void *comm, void *) {
  return answer(__func__, [&] {
    if (!number) return;
    Group group = group_of(comm);
    demand(items, BAD_POINTER, "sendRecvInfo is null");
    std::vector<Transfer> transfers;
    for (const HcclSendRecvItem *item = items; item < items + number; ++item) {
      demand(item->type == 0 || item->type == 1, BAD_PARAMETER, "an item that neither sends nor receives");
      check_rank(*group, item->remote, "remoteRank");
      if (!item->count) continue;
      check(item->count, item->kind, item->buffer, "buf");
      transfers.push_back({!item->type, static_cast<char *>(item->buffer), item->count, item->kind, item->remote});
    }
    if (transfers.empty()) return;
    std::lock_guard<std::mutex> held(group->busy);
    move(*group, "HcclBatchSendRecv", transfers);
  });
}
}
