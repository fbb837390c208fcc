// SPDX-License-Identifier: Apache-2.0
// Launches, and the OS threads that blocks run on. The threads are kept between launches.
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <moegen/block.hpp>

struct moegen_host_running {
    moegen::host::Launch launch;
};

namespace moegen::host {

namespace {

thread_local Block* running_block __attribute__((tls_model("initial-exec"))) = nullptr;

#if defined(__x86_64__)
constexpr bool kNeedsWholeAccesses = true;
#else
constexpr bool kNeedsWholeAccesses = false;  // there is another way, see whole.hpp
#endif

struct Worker {
    std::mutex mutex;
    std::condition_variable work_came;
    Launch* launch = nullptr;
    uint32_t index = 0;

    void give(Launch& its_launch, uint32_t its_index) {
        const std::lock_guard lock(mutex);
        launch = &its_launch;
        index = its_index;
        work_came.notify_one();
    }
};

struct Pool {
    std::mutex mutex;
    std::vector<Worker*> idle;
};

// Never destroyed: its threads outlive static destructors. A forked child has none of the threads, hence a new pool.
Pool* pool = nullptr;

void renew_pool() { pool = new Pool; }

__attribute__((constructor)) void make_pool() {
    renew_pool();
    pthread_atfork(nullptr, nullptr, renew_pool);
}

void keep(const std::vector<Worker*>& workers) {
    const std::lock_guard lock(pool->mutex);
    pool->idle.insert(pool->idle.end(), workers.begin(), workers.end());
}

void finish_block(Launch& launch) {
    const std::lock_guard lock(launch.mutex);
    if (--launch.running == 0) launch.block_done.notify_one();
}

void* serve(void* argument) {
    Worker& self = *static_cast<Worker*>(argument);
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);  // the default lets a sleep of 1 us last 50
    prctl(PR_SET_NAME, "moegen block", 0, 0, 0);
    Block block;
    running_block = &block;
    for (;;) {
        std::unique_lock lock(self.mutex);
        self.work_came.wait(lock, [&] { return self.launch != nullptr; });
        Launch& launch = *self.launch;
        self.launch = nullptr;
        lock.unlock();
        block.run(launch, self.index);
        keep({&self});
        finish_block(launch);
    }
}

Worker* start_worker() {
    auto worker = std::make_unique<Worker>();
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    pthread_t thread;
    const int failed = pthread_create(&thread, nullptr, serve, worker.get());
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failed) return nullptr;
    pthread_detach(thread);
    return worker.release();
}

// All or nothing: a block without a thread would be waited for by the others.
std::vector<Worker*> take_workers(uint32_t count) {
    std::vector<Worker*> taken;
    {
        const std::lock_guard lock(pool->mutex);
        std::vector<Worker*>& idle = pool->idle;
        const std::size_t kept = idle.size() - std::min<std::size_t>(count, idle.size());
        taken.assign(idle.begin() + long(kept), idle.end());
        idle.resize(kept);
    }
    while (taken.size() < count) {
        Worker* worker = start_worker();
        if (worker == nullptr) {
            keep(taken);
            return {};
        }
        taken.push_back(worker);
    }
    return taken;
}

std::string objection(const moegen_host_launch& request) {
    const auto limit = [](const char* what, uint32_t value, uint32_t lowest, uint32_t highest) {
        if (value >= lowest && value <= highest) return std::string();
        return std::string(what) + " must be " + std::to_string(lowest) + " to " + std::to_string(highest) + ", not " +
               std::to_string(value);
    };
    if (!has_whole_accesses && kNeedsWholeAccesses) return "the host target needs a CPU with AVX";
    if (running_block != nullptr) return "a kernel cannot launch a kernel";
    if (request.wait_ms != 0 && request.running == nullptr) return "`wait_ms` needs `running`";
    std::string text = limit("grid", request.grid, 1, kMaxBlocks);
    if (text.empty()) text = limit("block", request.block, 1, kMaxThreads);
    if (text.empty()) text = limit("shared_bytes", request.shared_bytes, 0, kMaxShared);
    return text;
}

constexpr int kDone = 0, kFailed = 1, kRunsOn = 2;

int report(const std::string& text, char* error, unsigned long error_bytes) {
    if (error_bytes != 0) std::snprintf(error, error_bytes, "%s", text.c_str());
    return text.empty() ? kDone : kFailed;
}

bool is_over(Launch& launch, uint32_t wait_ms) {
    std::unique_lock lock(launch.mutex);
    const auto over = [&] { return launch.running == 0; };
    if (wait_ms != 0) return launch.block_done.wait_for(lock, std::chrono::milliseconds(wait_ms), over);
    launch.block_done.wait(lock, over);
    return true;
}

int start_and_wait(const moegen_host_kernel& kernel, const moegen_host_launch& request, char* error,
                   unsigned long error_bytes) {
    std::string text = objection(request);
    if (!text.empty()) return report(text, error, error_bytes);
    auto running = std::make_unique<moegen_host_running>();
    Launch& launch = running->launch;
    launch.kernel = &kernel;
    launch.request = request;
    launch.running = request.grid;
    const std::vector<Worker*> workers = take_workers(request.grid);
    if (workers.empty()) return report("the system starts no more threads", error, error_bytes);
    for (uint32_t i = 0; i < request.grid; ++i) workers[i]->give(launch, i);
    if (is_over(launch, request.wait_ms)) return report(launch.error, error, error_bytes);
    *request.running = running.release();
    return kRunsOn;
}

}  // namespace

Block& this_block() { return *running_block; }

}  // namespace moegen::host

int moegen_host_run(moegen_host_kernel* kernel, const moegen_host_launch* launch, char* error,
                    unsigned long error_bytes) {
    return moegen::host::start_and_wait(*kernel, *launch, error, error_bytes);
}

int moegen_host_wait(moegen_host_running* running, unsigned wait_ms, char* error, unsigned long error_bytes) {
    if (!moegen::host::is_over(running->launch, std::max(wait_ms, 1u))) return moegen::host::kRunsOn;
    const std::unique_ptr<moegen_host_running> owned(running);
    *running->launch.request.running = nullptr;
    return moegen::host::report(running->launch.error, error, error_bytes);
}

void moegen_host_stop(moegen_host_running* running) { running->launch.record_failure("stopped by its caller"); }
