// Work shared among threads, and scratch memory of a thread.
//
// The threads are those of the OpenMP runtime torch has loaded: a second pool in the process would fight torch's for
// the cores. So this library links no OpenMP; its loader hands over that runtime's GOMP_parallel, the entry point that
// compilers emit calls to (libgomp's stable ABI, also offered by LLVM's libomp). Without it, all work is the caller's.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace {

using Fork = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
Fork fork_team = nullptr;

// Work(i) for every i of [0, items), taken by whoever is free.
struct Job {
    void (*work)(void* data, int64_t i);
    void* data;
    int64_t items;
    std::atomic<int64_t> next{0};

    void take_part() {
        for (;;) {
            int64_t i = next.fetch_add(1, std::memory_order_relaxed);
            if (i >= items) return;
            work(data, i);
        }
    }
};

inline void pause_thread() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Threads that stay together for many jobs, as a graph has: a fork and join of OpenMP costs more than a small op. One
// thread leads; the others watch for its next job. A watcher that sees none for a while lets other processes run.
class Crew {
  public:
    // Calls lead() on this thread while up to threads - 1 others take part in what it shares.
    template <class F> static void gather(int threads, F&& lead) {
        if (threads <= 1 || fork_team == nullptr || current != nullptr) return lead();
        struct All {
            Crew crew;
            F& lead;
            std::atomic<int> entered{0};
        } all{{}, lead};
        fork_team(
            [](void* data) {
                All& all = *(All*)data;
                if (all.entered.fetch_add(1) > 0) return all.crew.follow();
                current = &all.crew;
                all.lead();
                current = nullptr;
                all.crew.closed_.store(true, std::memory_order_release);
            },
            &all, (unsigned)threads, 0);
    }

    static Crew* of_this_thread() { return current; }

    void run(Job& job) {
        job_.store(&job, std::memory_order_release);
        job.take_part();
        job_.store(nullptr, std::memory_order_seq_cst);  // nobody new joins; who has joined holds `busy_`
        for (int spins = 0; busy_.load(std::memory_order_seq_cst) > 0; spins++) wait(spins);
    }

  private:
    void follow() {
        for (int spins = 0; !closed_.load(std::memory_order_acquire); spins++) {
            if (job_.load(std::memory_order_relaxed) == nullptr) {
                wait(spins);
                continue;
            }
            busy_.fetch_add(1, std::memory_order_seq_cst);
            Job* job = job_.load(std::memory_order_seq_cst);  // again: it may have ended before we said we were busy
            if (job != nullptr) job->take_part(), spins = 0;
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    static void wait(int spins) {
        if (spins < 4096)
            pause_thread();
        else
            sched_yield();
    }

    static thread_local Crew* current;
    std::atomic<Job*> job_{nullptr};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<bool> closed_{false};
};
thread_local Crew* Crew::current = nullptr;

// Calls work(i) once for every i of [0, items), on up to `threads` threads, in no particular order.
template <class F> void share(int64_t items, int threads, F&& work) {
    if (threads > items) threads = (int)items;
    if (threads <= 1 || fork_team == nullptr) {
        for (int64_t i = 0; i < items; i++) work(i);
        return;
    }
    Job job;
    job.work = [](void* data, int64_t i) { (*(std::remove_reference_t<F>*)data)(i); };
    job.data = (void*)&work, job.items = items;
    if (Crew* crew = Crew::of_this_thread()) return crew->run(job);
    // The runtime may give fewer threads than asked for, so nothing is assigned to a thread beforehand.
    fork_team([](void* data) { ((Job*)data)->take_part(); }, &job, (unsigned)threads, 0);
}

// Calls work(first, last) for parts of [0, rows). Below `SMALL` elements, about 20 microseconds, the caller works alone:
// a fork saves little then, and costs a time slice when another process holds the second core.
constexpr int64_t SMALL = 1 << 17;
template <class F> void share_rows(int64_t rows, int64_t elements_per_row, int threads, F&& work) {
    if (threads <= 1 || rows * elements_per_row < SMALL) return work((int64_t)0, rows);
    int64_t parts = rows < threads ? rows : threads;
    share(parts, threads, [&](int64_t i) { work(rows * i / parts, rows * (i + 1) / parts); });
}

// Memory of the calling thread, aligned to a cache line, kept until the thread ends. `get` invalidates the last `get`.
class Scratch {
  public:
    ~Scratch() { free(memory_); }
    template <class T> T* get(size_t n) {
        size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            free(memory_);
            memory_ = aligned_alloc(64, bytes);
            if (memory_ == nullptr) abort();
            size_ = bytes;
        }
        return (T*)memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace
