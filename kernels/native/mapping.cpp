#include "mapping.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <system_error>

namespace chipbus {

namespace {

constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; older headers lack it

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

}  // namespace

Mapping::Mapping(int file, size_t bytes, bool is_writable) : file_(file), begin_(nullptr), bytes_(bytes) {
    // By itself the kernel aligns a file only where an administrator has allowed memory files huge pages.
    void* reserved = mmap(nullptr, bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) fail("mmap");
    char* first = static_cast<char*>(reserved);
    const size_t before = (kHugePage - reinterpret_cast<size_t>(first) % kHugePage) % kHugePage;
    begin_ = first + before;
    if (before > 0) munmap(first, before);
    if (before < kHugePage) munmap(begin_ + bytes, kHugePage - before);
    try {
        map(is_writable);
    } catch (...) {
        munmap(begin_, bytes);
        throw;
    }
}

Mapping::~Mapping() { munmap(begin_, bytes_); }

void Mapping::map(bool is_writable) {
    // Read-only it is a private mapping: a file that is sealed against writing cannot be shared before Linux 6.7, and
    // as nothing is ever written the pages are the file's own either way.
    const int protection = is_writable ? PROT_READ | PROT_WRITE : PROT_READ;
    const int kind = is_writable ? MAP_SHARED : MAP_PRIVATE;
    if (mmap(begin_, bytes_, protection, kind | MAP_FIXED, file_, 0) == MAP_FAILED) fail("mmap");
    madvise(begin_, bytes_, MADV_HUGEPAGE);
}

// Memory files get no huge pages by default (shmem_enabled is "never" in most distributions); a 2-core Xeon reads 26 to
// 30 GB/s without them, 33 to 35 with. MADV_COLLAPSE does not ask that setting; of a range that holds one page and else
// nothing it makes a huge page at the price of zeroing it. MFD_HUGETLB would need pages that somebody has reserved.
void Mapping::take_huge_pages(Cores& cores) {
    std::atomic<bool> are_out{false};
    cores.each(static_cast<int64_t>(bytes_ / kHugePage), [&](int64_t index) {
        if (are_out.load(std::memory_order_relaxed)) return;
        char* at = begin_ + static_cast<size_t>(index) * kHugePage;
        *static_cast<volatile char*>(at) = 0;
        if (madvise(at, kHugePage, kCollapse) != 0) are_out.store(true, std::memory_order_relaxed);
    });
}

void Mapping::make_read_only() { map(false); }

}  // namespace chipbus
