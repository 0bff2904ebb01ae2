// Processes of one host that work together: memory they share, joining, waiting, and what became of the others.
//
// The memory has no name: the process of rank 0 makes it and hands it to the others through a socket of the kernel's
// abstract names, so that nothing is left behind however the processes end. Each holds a lock on a byte of it while it
// lives, which the kernel lets go when it ends, however it ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

// HcclResult
enum HcclResult : int {
  SUCCESS = 0, BAD_PARAMETER = 1, BAD_POINTER = 2, INTERNAL = 4, NOT_SUPPORTED = 5, NOT_FOUND = 6, SYSTEM_CALL = 8,
  TIMED_OUT = 9, REMOTE = 21,
};

struct Failure {
  int code;
  std::string reason;
};

// Throw a Failure unless the condition holds.
void demand(bool condition, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

constexpr size_t CHUNK = 1 << 20;           // bytes that a rank shows all others at once
constexpr size_t PAIR_CHUNK = 1 << 18;      // bytes on their way from one rank to another
constexpr uint32_t MOST_RANKS = 64;

// What a rank was called with; all ranks of a collective must have been called with the same.
struct Call {
  char name[24];
  int dtype;
  int reduction;
  uint32_t root;
  uint64_t count;
};

struct RankState {
  Call call;
  std::atomic<uint32_t> joined;
  std::atomic<uint32_t> bell;        // counts what happened on this rank's pairs
  std::atomic<uint32_t> sending_to;  // 1 + the rank that HcclSend waits for
  uint64_t sizes[MOST_RANKS];        // bytes that this rank has for each rank
};

// What is on its way from one rank to another.
struct Pair {
  std::atomic<uint32_t> full;
  uint32_t bytes;  // of this piece
  uint64_t count;  // of the whole message
  int dtype;
};

struct SharedState {
  std::atomic<uint32_t> arrived;
  std::atomic<uint32_t> generation;  // counts barriers
  std::atomic<uint32_t> broken;      // 0, or 1 + the code of the failure that ended the group
  std::atomic<uint32_t> breaking;    // who comes first writes the reason
  char reason[400];
  RankState ranks[MOST_RANKS];
};

class SharedGroup {
 public:
  // Join a group of processes that know its name. Waits for all.
  SharedGroup(const std::string &name, uint32_t count, uint32_t rank);
  ~SharedGroup() { leave(); }
  SharedGroup(const SharedGroup &) = delete;

  const std::string name;
  const uint32_t count, rank;
  std::mutex busy;  // one operation at a time, as on a stream

  RankState &state(uint32_t of) const { return shared_->ranks[of]; }
  char *chunk(uint32_t of) const { return data_ + of * CHUNK; }
  Pair &pair(uint32_t from, uint32_t to) const { return pairs_[from * count + to]; }
  char *pair_chunk(uint32_t from, uint32_t to) const {
    return data_ + count * CHUNK + (from * count + to) * PAIR_CHUNK;
  }

  // Wait for all ranks. `what` names the operation in messages.
  void barrier(const char *what);

  // Wait until `done`, which is asked again whenever this rank's bell rings. Throws when a peer is gone.
  void wait(const char *what, const std::vector<uint32_t> &peers, const std::function<bool()> &done);
  void ring(uint32_t of);

  // End the group: all ranks that wait throw this reason. Throws it.
  [[noreturn]] void end(int code, const std::string &reason);
  int failed() const;  // code of the failure that ended the group, 0 for none

 private:
  void until(std::atomic<uint32_t> &word, const char *what, const std::vector<uint32_t> &peers,
             const std::function<bool()> &done);
  bool gone(uint32_t of) const;
  void map();
  void leave();

  double seconds_;  // that one waits for others at most, 0 for ever
  const char *limit_name_ = "HCCL_CONNECT_TIMEOUT";
  int file_ = -1;
  size_t bytes_ = 0;
  SharedState *shared_ = nullptr;
  Pair *pairs_ = nullptr;
  char *data_ = nullptr;
  std::vector<uint32_t> others_;
};
