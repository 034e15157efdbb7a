// Calls fn(task) for every task through the plain function pointer that `parallel` takes.
template <class Fn>
void parallel_for(Parallel parallel, int64_t tasks, Fn&& fn) {
  parallel(tasks, [](int64_t task, void* context) { (*(std::remove_reference_t<Fn>*)context)(task); }, (void*)&fn);
}

// Whether a task is the first of a thread's share (csrc/each.h).
inline bool begins_share(int64_t task, int64_t tasks, int64_t threads) {
  threads = std::min(threads, tasks);
  return tasks * ((task * threads + tasks - 1) / tasks) / threads == task;
}

// Whether the task after this one is of the same share, so that what it reads may be asked for here.
inline bool has_next(int64_t task, int64_t tasks, int64_t threads) {
  return task + 1 < tasks && !begins_share(task + 1, tasks, threads);
}

// Adds `count` partial vectors of n floats in their order.
inline void ordered_sum(const float* parts, int64_t count, int64_t n, int64_t stride, float* out) {
  for (int64_t i = 0; i < n; i += W) {
    F total = load_n(parts + i, n - i);
    for (int64_t k = 1; k < count; ++k) total = total + load_n(parts + k * stride + i, n - i);
    store_n(out + i, total, n - i);
  }
}
