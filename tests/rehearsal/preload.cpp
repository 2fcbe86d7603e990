// Stands in for two functions of PyTorch's CUDA library, so that it believes in devices.
static int count = 0;
extern "C" void set_fake_device_count(int n) { count = n; }
namespace c10 { namespace cuda {
signed char device_count() noexcept { return count; }
bool hasPrimaryContext(signed char) { return false; }
}}
