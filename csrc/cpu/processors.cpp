#include "processors.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <dirent.h>
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace fused_lstm::cpu {
namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

// "200000 100000" or "max 100000": microseconds of time in each period of so many.
double quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double time, period;
  return file >> time >> period && time > 0 && period > 0 ? time / period : kUnlimited;
}

double quota_v1(const std::string& folder) {
  std::ifstream times(folder + "/cpu.cfs_quota_us"), periods(folder + "/cpu.cfs_period_us");
  double time, period;
  return times >> time && periods >> period && time > 0 && period > 0 ? time / period : kUnlimited;
}

// The tightest of a group and all above it. In a container the mount may begin at the group itself,
// so that folders on the way are missing.
double tightest(double (*quota)(const std::string&), const std::string& mount,
                const std::string& group) {
  double least = quota(mount);
  for (size_t end = group.size(); end > 1 && end != std::string::npos;
       end = group.rfind('/', end - 1))
    least = std::min(least, quota(mount + group.substr(0, end)));
  return least;
}

bool names_cpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');)
    if (name == "cpu") return true;
  return false;
}

int cap_from_environment() {
  const char* text = std::getenv("FUSED_LSTM_THREADS");
  return text ? std::max(0, std::atoi(text)) : 0;
}

int affinity() {
#if defined(_OPENMP)
  // Where OpenMP binds its threads, it has bound this one, too, to one processor.
  if (omp_get_proc_bind() != omp_proc_bind_false) return std::max(1, omp_get_num_procs());
#endif
#if defined(__linux__)
  cpu_set_t set;  // fails where the system has more than 1,024 processors
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

// All threads of a process, in whose folder of tasks each has one; negative where it isn't said.
int64_t nanoseconds_in_line(const std::string& tasks) {
  int64_t all = -1;
#if defined(__linux__)
  if (DIR* folder = opendir(tasks.c_str())) {
    while (const dirent* entry = readdir(folder)) {
      std::ifstream file(tasks + "/" + entry->d_name + "/schedstat");
      int64_t running, in_line;
      if (file >> running >> in_line) all = std::max<int64_t>(all, 0) + in_line;
    }
    closedir(folder);
  }
#endif
  return all;
}

// --- fork ---------------------------------------------------------------------------------------

// A child has the thread that forked and no other, while OpenMP's runtime still counts on those
// that it had started: a parallel region would wait for them for ever. Where the parent had one
// thread, there were none.
bool forked_off_several = false, had_several = false;

#if defined(__linux__)
void before_fork() {
  int threads = 0;
  if (DIR* folder = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(folder)) threads += entry->d_name[0] != '.';
    closedir(folder);
  }
  had_several = threads != 1;
}
#elif !defined(_WIN32)
void before_fork() { had_several = true; }
#endif

#if !defined(_WIN32)
void in_the_child() { forked_off_several |= had_several; }
const int registered = pthread_atfork(before_fork, nullptr, in_the_child);
#endif

}  // namespace

double processor_quota(const std::string& proc_cgroup, const std::string& mount) {
  double least = kUnlimited;
  std::ifstream groups(proc_cgroup);
  for (std::string line; std::getline(groups, line);) {
    // "0::/user.slice" (version 2), "4:cpu,cpuacct:/docker/ab12" (version 1)
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) least = std::min(least, tightest(quota_v2, mount, group));
    if (names_cpu(controllers))
      for (const std::string& folder : {std::string("/cpu"), "/" + controllers})
        least = std::min(least, tightest(quota_v1, mount + folder, group));
  }
  return least == kUnlimited ? 0 : least;
}

Processors processors() {
  static const double quota = processor_quota("/proc/self/cgroup", "/sys/fs/cgroup");
  static const int cap = cap_from_environment();
  return {affinity(), quota, cap, forked_off_several};
}

int thread_limit(int wanted, const Processors& found) {
  if (found.forked) return 1;
  int limit = std::min(wanted, found.affinity);
  if (found.quota > 0) limit = std::min(limit, int(std::ceil(found.quota)));
  if (found.cap > 0) limit = std::min(limit, found.cap);
  return std::max(limit, 1);
}

Queue::Queue(int64_t now, std::string tasks)
    : tasks_(std::move(tasks)), asked_(now), before_(nanoseconds_in_line(tasks_)) {}

bool Queue::stood_in(int64_t now) {
  const int64_t all = nanoseconds_in_line(tasks_);
  const int64_t stood = all - before_.exchange(all, std::memory_order_relaxed);
  const int64_t since = now - asked_.exchange(now, std::memory_order_relaxed);
  return all < 0 || (stood >= kLeast && stood >= since / 20);
}

std::atomic<bool> impatient{false}, any_pace{false};

void Contention::report(bool stalled, int64_t began, int64_t now) {
  if (!stalled) return;
  const int64_t last = pause_.load(std::memory_order_relaxed);
  const bool again = last > 0 && began - until_.load(std::memory_order_relaxed) < kWell;
  const int64_t pause = again ? std::min(2 * last, kLongest) : first_;
  pause_.store(pause, std::memory_order_relaxed);
  until_.store(now + pause, std::memory_order_relaxed);
}

}  // namespace fused_lstm::cpu
