// A memory file in the address space, in huge pages where the kernel gives them.
#pragma once

#include <cstddef>

#include "cores.h"

namespace chipbus {

constexpr size_t kHugePage = size_t{1} << 21;

class Mapping {
  public:
    // Bytes [0, ``bytes``) of ``file``, which stays open, at a multiple of ``kHugePage``: only there the kernel can map
    // a huge page of a file as one. ``bytes`` is such a multiple, too. Throws std::system_error.
    Mapping(int file, size_t bytes, bool is_writable);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    char* begin() const { return begin_; }

    // Take memory for all of an empty file now, a huge page at a time, until the kernel has no more of them; what is
    // left gets pages as it is written.
    void take_huge_pages(Cores& cores);

    // The same bytes at the same place, and no way to write them: neither here nor, for this mapping's part, anywhere.
    void make_read_only();

  private:
    void map(bool is_writable);

    int file_;
    char* begin_;
    size_t bytes_;
};

}  // namespace chipbus
