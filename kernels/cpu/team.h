// Work shared among threads, and scratch memory of a thread.
//
// The threads are those of the OpenMP runtime torch has loaded: a second pool in the process would fight torch's for
// the cores. So this library links no OpenMP; its loader hands over that runtime's GOMP_parallel, the entry point that
// compilers emit calls to (libgomp's stable ABI, also offered by LLVM's libomp). Without it, all work is the caller's.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

using Fork = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
Fork fork_team = nullptr;

// Calls work(i) once for every i of [0, items), on up to `threads` threads, in no particular order.
template <class F> void share(int64_t items, int threads, F&& work) {
    if (threads > items) threads = (int)items;
    if (threads <= 1 || fork_team == nullptr) {
        for (int64_t i = 0; i < items; i++) work(i);
        return;
    }
    struct Team {
        F& work;
        int64_t items;
        std::atomic<int64_t> next;
    } team{work, items, {0}};
    // The runtime may give fewer threads than asked for, so nothing is assigned to a thread beforehand.
    fork_team(
        [](void* data) {
            Team& team = *(Team*)data;
            for (;;) {
                int64_t i = team.next.fetch_add(1, std::memory_order_relaxed);
                if (i >= team.items) return;
                team.work(i);
            }
        },
        &team, (unsigned)threads, 0);
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
