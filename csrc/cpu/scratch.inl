// Work memory that outlives a call: fresh pages cost more than the arithmetic that first touches them.
// One copy an instruction set, because an inline function shared between them would be compiled for only one.
inline void* allocate_pages(size_t bytes) {
  constexpr size_t huge = size_t{2} << 20, least = size_t{128} << 10;  // what lies on many small pages is found slowly
  const size_t alignment = bytes >= least ? huge : 64;
  void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == huge) madvise(p, bytes, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
  return p;
}

// One growing buffer a slot and thread; a slot's content lasts until the slot is asked for again.
class Scratch {
 public:
  template <class T>
  T* get(int slot, int64_t count) {
    Buffer& b = buffers_[slot];
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (b.bytes < bytes) {
      std::free(b.data);
      b.data = nullptr;
      b.bytes = 0;
      b.data = allocate_pages(bytes);
      b.bytes = bytes;
    }
    return static_cast<T*>(b.data);
  }
  ~Scratch() {
    for (Buffer& b : buffers_) std::free(b.data);
  }

 private:
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
  };
  Buffer buffers_[19];
};

// Slots that products use themselves; 0 to 16 are their callers'.
constexpr int kPartsScratch = 17, kTotalsScratch = 18;

inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}
