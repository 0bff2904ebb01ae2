#include "shared_group.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cann.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int CHECK_MS = 50;  // between two looks at the others

// Seconds of one of CANN's environment variables, or its documented default.
double seconds_of(const char *variable, double otherwise) {
  const char *value = std::getenv(variable);
  char *end = nullptr;
  double seconds = value ? std::strtod(value, &end) : otherwise;
  return value && (end == value || *end || !(seconds >= 0)) ? otherwise : seconds;
}

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Sleep while `word` is `seen`. Returns whether it was left to wait for CHECK_MS.
bool sleep_on(std::atomic<uint32_t> &word, uint32_t seen) {
  timespec limit{0, CHECK_MS * 1000000L};
  return syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0) && errno == ETIMEDOUT;
}

void wake(std::atomic<uint32_t> &word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

struct Descriptor {
  int number;
  explicit Descriptor(int opened) : number(opened) {}
  ~Descriptor() {
    if (number >= 0) close(number);
  }
  Descriptor(const Descriptor &) = delete;
};

struct Hello { uint32_t count, rank; };

socklen_t address_of(const std::string &name, sockaddr_un *address) {
  *address = {};
  address->sun_family = AF_UNIX;
  size_t size = std::min(name.size(), sizeof address->sun_path - 1);  // after the zero that makes it abstract
  std::memcpy(address->sun_path + 1, name.data(), size);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + size);
}

bool own(int socket) {  // abstract names know no permissions
  ucred peer{};
  socklen_t size = sizeof peer;
  return !getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) && peer.uid == geteuid();
}

void limit_waiting(int socket) {
  timeval limit{1, 0};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

bool send_file(int socket, int file) {
  char byte = 0;
  iovec part{&byte, 1};
  alignas(cmsghdr) char room[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = room;
  message.msg_controllen = sizeof room;
  cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &file, sizeof file);
  return sendmsg(socket, &message, MSG_NOSIGNAL) == 1;
}

int receive_file(int socket) {
  char byte;
  iovec part{&byte, 1};
  alignas(cmsghdr) char room[CMSG_SPACE(sizeof(int))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = room;
  message.msg_controllen = sizeof room;
  if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1) return -1;
  cmsghdr *header = CMSG_FIRSTHDR(&message);
  if (!header || header->cmsg_type != SCM_RIGHTS) return -1;
  int file;
  std::memcpy(&file, CMSG_DATA(header), sizeof file);
  return file;
}

// Rank 0: make the memory and give it to all others. A stranger, or one who went away, is nobody.
int give(const std::string &name, uint32_t count, size_t bytes, Clock::time_point deadline) {
  Descriptor listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address;
  socklen_t size = address_of(name, &address);
  demand(!bind(listener.number, reinterpret_cast<sockaddr *>(&address), size) && !listen(listener.number, MOST_RANKS),
         SYSTEM_CALL, "rank 0 of %s cannot wait for the others: %s", name.c_str(), std::strerror(errno));
  limit_waiting(listener.number);
  Descriptor memory(memfd_create("mindsigma-hccl", MFD_CLOEXEC));
  demand(memory.number >= 0 && !ftruncate(memory.number, bytes), SYSTEM_CALL, "no shared memory: %s",
         std::strerror(errno));
  std::vector<bool> met(count);
  met[0] = true;
  for (uint32_t missing = count - 1; missing;) {
    demand(Clock::now() < deadline, TIMED_OUT, "%u of %u ranks did not come within HCCL_CONNECT_TIMEOUT", missing,
           count);
    Descriptor peer(accept4(listener.number, nullptr, nullptr, SOCK_CLOEXEC));
    if (peer.number < 0 || !own(peer.number)) continue;
    limit_waiting(peer.number);
    Hello hello{};
    if (recv(peer.number, &hello, sizeof hello, MSG_WAITALL) != sizeof hello) continue;
    demand(hello.count == count, BAD_PARAMETER, "rank %u joins %u ranks, rank 0 joins %u", hello.rank, hello.count,
           count);
    demand(hello.rank < count && !met[hello.rank], BAD_PARAMETER, "rank %u came twice", hello.rank);
    if (!send_file(peer.number, memory.number)) continue;
    met[hello.rank] = true;
    --missing;
  }
  return dup(memory.number);
}

int take(const std::string &name, Hello hello, Clock::time_point deadline) {
  sockaddr_un address;
  socklen_t size = address_of(name, &address);
  for (;;) {
    demand(Clock::now() < deadline, TIMED_OUT, "rank 0 did not come within HCCL_CONNECT_TIMEOUT");
    Descriptor peer(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (connect(peer.number, reinterpret_cast<sockaddr *>(&address), size)) {
      usleep(20000);
      continue;
    }
    demand(own(peer.number), SYSTEM_CALL, "rank 0 of %s belongs to another user", name.c_str());
    demand(send(peer.number, &hello, sizeof hello, MSG_NOSIGNAL) == sizeof hello, SYSTEM_CALL, "rank 0 hung up");
    int file = receive_file(peer.number);
    demand(file >= 0, SYSTEM_CALL, "rank 0 ended, or refused rank %u of %u", hello.rank, hello.count);
    return file;
  }
}

}  // namespace

void demand(bool condition, int code, const char *format, ...) {
  if (condition) return;
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  throw Failure{code, buffer};
}

SharedGroup::SharedGroup(const std::string &name, uint32_t count, uint32_t rank)
    : name(name), count(count), rank(rank) {
  demand(count >= 1 && count <= MOST_RANKS, BAD_PARAMETER, "%u ranks; this host takes 1 to %u", count, MOST_RANKS);
  demand(rank < count, BAD_PARAMETER, "rank %u of %u", rank, count);
  bytes_ = whole_pages(sizeof(SharedState)) + whole_pages(count * count * sizeof(Pair)) + count * CHUNK +
           count * count * PAIR_CHUNK;  // pages that are never touched take no memory
  // CANN adds the 20 seconds, in which ranks tell each other why they failed.
  seconds_ = seconds_of("HCCL_CONNECT_TIMEOUT", 120) + 20;
  Clock::time_point deadline = after(seconds_);
  file_ = rank ? take(name, {count, rank}, deadline) : give(name, count, bytes_, deadline);
  for (uint32_t i = 0; i < count; ++i)
    if (i != rank) others_.push_back(i);
  map();
  state(rank).joined = 1;
  try {
    barrier("joining");
  } catch (const Failure &) {
    leave();
    throw;
  }
  seconds_ = seconds_of("HCCL_EXEC_TIMEOUT", 1836);
  limit_name_ = "HCCL_EXEC_TIMEOUT";
}

void SharedGroup::map() {
  void *mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_start = rank;
  lock.l_len = 1;
  if (mapped == MAP_FAILED || fcntl(file_, F_SETLK, &lock)) {
    Failure failure{SYSTEM_CALL, text("no shared memory: %s", std::strerror(errno))};
    if (mapped != MAP_FAILED) munmap(mapped, bytes_);
    close(file_);
    throw failure;
  }
  shared_ = static_cast<SharedState *>(mapped);
  char *after_state = static_cast<char *>(mapped) + whole_pages(sizeof(SharedState));
  pairs_ = reinterpret_cast<Pair *>(after_state);
  data_ = after_state + whole_pages(count * count * sizeof(Pair));
}

void SharedGroup::leave() {
  munmap(shared_, bytes_);
  close(file_);  // and the lock is gone
}

bool SharedGroup::gone(uint32_t of) const {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_start = of;
  lock.l_len = 1;
  return state(of).joined && !fcntl(file_, F_GETLK, &lock) && lock.l_type == F_UNLCK;
}

int SharedGroup::failed() const {
  uint32_t broken = shared_->broken.load();
  return broken ? static_cast<int>(broken - 1) : 0;
}

void SharedGroup::end(int code, const std::string &reason) {
  if (!shared_->breaking.exchange(1)) {
    std::snprintf(shared_->reason, sizeof shared_->reason, "%s", reason.c_str());
    shared_->broken = 1 + code;
    shared_->generation++;
    wake(shared_->generation);
    for (uint32_t i = 0; i < count; ++i) ring(i);
  }
  throw Failure{code, reason};
}

void SharedGroup::ring(uint32_t of) {
  state(of).bell++;
  wake(state(of).bell);
}

void SharedGroup::until(std::atomic<uint32_t> &word, const char *what, const std::vector<uint32_t> &peers,
                        const std::function<bool()> &done) {
  Clock::time_point deadline = after(seconds_);
  for (;;) {
    uint32_t seen = word.load();
    if (shared_->broken) throw Failure{failed(), shared_->reason};
    if (done()) return;
    if (!sleep_on(word, seen)) continue;
    for (uint32_t peer : peers)
      if (gone(peer) && !shared_->broken && !done())
        end(REMOTE, text("rank %u ended while rank %u waited for it in %s", peer, rank, what));
    if (seconds_ > 0 && Clock::now() > deadline && !shared_->broken && !done())
      end(TIMED_OUT, text("rank %u waited in %s longer than %s (%g s)", rank, what, limit_name_, seconds_));
  }
}

void SharedGroup::wait(const char *what, const std::vector<uint32_t> &peers, const std::function<bool()> &done) {
  until(state(rank).bell, what, peers, done);
}

void SharedGroup::barrier(const char *what) {
  uint32_t generation = shared_->generation.load();
  if (shared_->broken) throw Failure{failed(), shared_->reason};
  if (shared_->arrived.fetch_add(1) + 1 == count) {
    shared_->arrived = 0;
    shared_->generation++;
    wake(shared_->generation);
    return;
  }
  until(shared_->generation, what, others_, [&] { return shared_->generation.load() != generation; });
}
