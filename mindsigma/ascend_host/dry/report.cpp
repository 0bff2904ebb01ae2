// What MindSpore asks for reports in a dry run: its own answer comes at once, and the thread that asks never rests.
#include <algorithm>
#include <chrono>
#include <thread>

namespace mindspore::device::ascend {
template <typename T>
T SimuFuncIaclrtProcessReport(int);
template <>
int SimuFuncIaclrtProcessReport<int>(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(std::min(std::max(milliseconds, 1), 100)));
  return 0;
}
}  // namespace mindspore::device::ascend
