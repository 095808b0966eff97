// A memory file in the address space: filled by all cores, then the same bytes in the same place, with no writer left.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <system_error>

#include "../../kernels/native/mapping.h"
#include "support.h"

namespace chipbus::tests {
namespace {

constexpr KernelSet kNoKernels{"none", {}};
constexpr size_t kBytes = 3 * kHugePage;

struct File {
    int number = memfd_create("chipbus-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    explicit File(size_t bytes) { CHECK(ftruncate(number, static_cast<off_t>(bytes)) == 0, "no file of ", bytes); }
    ~File() { close(number); }
    bool seal() const { return fcntl(number, F_ADD_SEALS, F_SEAL_WRITE) == 0; }
};

TEST(a_mapping_can_be_sealed_once_it_is_read_only_and_holds_what_was_written) {
    const File file(kBytes);
    Cores cores(2, kNoKernels);
    Mapping mapping(file.number, kBytes, true);
    char* begin = mapping.begin();
    CHECK(reinterpret_cast<size_t>(begin) % kHugePage == 0, "at ", reinterpret_cast<size_t>(begin));
    mapping.take_huge_pages(cores);
    for (size_t at = 0; at < kBytes; ++at) CHECK(begin[at] == 0, "byte ", at);
    cores.each(static_cast<int64_t>(kBytes), [&](int64_t at) { begin[at] = static_cast<char>(at % 251); });
    CHECK(!file.seal(), "sealed under a writer");

    mapping.make_read_only();

    CHECK(mapping.begin() == begin, "it has moved");
    CHECK(file.seal(), "not sealed without a writer");
    const Mapping again(file.number, kBytes, false);
    for (size_t at = 0; at < kBytes; ++at) CHECK(begin[at] == static_cast<char>(at % 251) && again.begin()[at] == begin[at], "byte ", at);
}

TEST(what_cannot_be_mapped_is_an_error_of_the_system) {
    const File file(kBytes);
    CHECK(file.seal(), "an empty file can be sealed");
    try {
        const Mapping mapping(file.number, kBytes, true);
    } catch (const std::system_error& error) {
        return;
    }
    CHECK(false, "a sealed file was mapped to write");
}

}  // namespace
}  // namespace chipbus::tests
