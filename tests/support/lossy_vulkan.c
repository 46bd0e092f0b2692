/* A Vulkan driver that passes everything to another one, but loses its device while a given file exists. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef void (*Function)(void);
typedef Function (*GetFunction)(void *handle, const char *name);
typedef int32_t (*Submit)(void *queue, uint32_t count, const void *submits, void *fence);
typedef int32_t (*Negotiate)(uint32_t *version);

enum { DEVICE_LOST = -4 };
static GetFunction of_instance, of_device;
static Submit submit_of_driver;

static void *driver(void) {
    static void *library;
    if (!library) library = dlopen(getenv("LOSSY_DRIVER"), RTLD_NOW | RTLD_LOCAL);
    return library;
}

static int32_t submit(void *queue, uint32_t count, const void *submits, void *fence) {
    const char *file = getenv("LOSSY_WHILE");
    if (file && access(file, F_OK) == 0) return DEVICE_LOST;
    return submit_of_driver(queue, count, submits, fence);
}

static Function get_of_device(void *device, const char *name) {
    Function found = of_device(device, name);
    if (strcmp(name, "vkQueueSubmit")) return found;
    submit_of_driver = (Submit)found;
    return (Function)submit;
}

Function vk_icdGetInstanceProcAddr(void *instance, const char *name) {
    if (!of_instance) of_instance = (GetFunction)dlsym(driver(), "vk_icdGetInstanceProcAddr");
    Function found = of_instance(instance, name);
    if (found && !strcmp(name, "vkGetDeviceProcAddr")) {
        of_device = (GetFunction)found;
        return (Function)get_of_device;
    }
    if (found && !strcmp(name, "vkQueueSubmit")) {
        submit_of_driver = (Submit)found;
        return (Function)submit;
    }
    return found;
}

Function vk_icdGetPhysicalDeviceProcAddr(void *instance, const char *name) {
    GetFunction of_physical = (GetFunction)dlsym(driver(), "vk_icdGetPhysicalDeviceProcAddr");
    return of_physical ? of_physical(instance, name) : 0;
}

int32_t vk_icdNegotiateLoaderICDInterfaceVersion(uint32_t *version) {
    return ((Negotiate)dlsym(driver(), "vk_icdNegotiateLoaderICDInterfaceVersion"))(version);
}
