// A libcuda.so.1 that loads; whatever asks it for a device is told that there is none.
#define NONE(name) int name() { return 100; }
NONE(cuCtxGetCurrent) NONE(cuCtxSetCurrent) NONE(cuDeviceGet) NONE(cuDeviceGetAttribute)
NONE(cuDevicePrimaryCtxRetain) NONE(cuFuncGetAttribute) NONE(cuFuncSetAttribute)
NONE(cuFuncSetCacheConfig) NONE(cuGetErrorString) NONE(cuLaunchCooperativeKernel)
NONE(cuLaunchKernel) NONE(cuLinkAddData_v2) NONE(cuLinkComplete) NONE(cuLinkCreate_v2)
NONE(cuModuleGetFunction) NONE(cuModuleLoad) NONE(cuModuleLoadData) NONE(cuModuleLoadDataEx)
NONE(cuModuleUnload) NONE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NONE(cuPointerGetAttribute) NONE(cuTensorMapEncodeTiled) NONE(cuInit) NONE(cuDriverGetVersion)
NONE(cuGetProcAddress_v2) NONE(cuGetProcAddress)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
