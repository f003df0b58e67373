/* A stand-in for libnvidia-ml.so.1 with the functions that harness.machine.nvml calls, for machines without a card.
 *
 * The file named by FAKE_NVML says what it answers, a line each:
 *
 *     count=2                    cards
 *     driver=575.51              of the system
 *     0.uuid=GPU-...             of card 0; a card M with M.parent=0 is a MIG instance of card 0 and not counted
 *     0.energy=1000,3500         answers in turn, the last one for ever
 *     0.processes=4711:1048576   process and bytes held, several separated by commas; "?" for unknown bytes
 *     rc.nvmlDeviceGetPowerUsage=3      what a function returns instead of an answer
 *
 * Values are in NVML's own units.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define DEVICES 16
#define ENTRIES 512

typedef struct { int index; } device_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned int pid; unsigned long long bytes; unsigned int gpu, compute; } process_t;
typedef struct { unsigned long long reference, violation; } violation_t;
typedef struct { unsigned int version; int margin; } margin_t;

static device_t devices[DEVICES];
static struct { char key[128]; char value[512]; int position; } entries[ENTRIES];
static int filled;

static void load(void)
{
    char line[700];
    FILE *file = fopen(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "", "r");
    if (file == NULL || filled)
        return;
    while (fgets(line, sizeof line, file) && filled < ENTRIES) {
        char *equals = strchr(line, '=');
        if (equals == NULL)
            continue;
        *equals = 0;
        equals[1 + strcspn(equals + 1, "\r\n")] = 0;
        snprintf(entries[filled].key, sizeof entries[filled].key, "%.127s", line);
        snprintf(entries[filled].value, sizeof entries[filled].value, "%.511s", equals + 1);
        filled++;
    }
    fclose(file);
    for (int i = 0; i < DEVICES; i++)
        devices[i].index = i;
}

static int find(const char *key)
{
    for (int i = 0; i < filled; i++)
        if (strcmp(entries[i].key, key) == 0)
            return i;
    return -1;
}

static const char *text(device_t *device, const char *what, const char *otherwise)
{
    char key[128];
    if (device)
        snprintf(key, sizeof key, "%d.%s", device->index, what);
    else
        snprintf(key, sizeof key, "%s", what);
    int i = find(key);
    return i < 0 ? otherwise : entries[i].value;
}

/* The next number of a comma-separated sequence; the last one stays. */
static unsigned long long number(device_t *device, const char *what, unsigned long long otherwise)
{
    char key[128];
    if (device)
        snprintf(key, sizeof key, "%d.%s", device->index, what);
    else
        snprintf(key, sizeof key, "%s", what);
    int i = find(key);
    if (i < 0)
        return otherwise;
    const char *at = entries[i].value;
    for (int skip = entries[i].position; skip > 0 && strchr(at, ','); skip--)
        at = strchr(at, ',') + 1;
    if (strchr(at, ','))
        entries[i].position++;
    return strtoull(at, NULL, 0);
}

static int refusal(const char *function)
{
    char key[128];
    snprintf(key, sizeof key, "rc.%s", function);
    int i = find(key);
    return i < 0 ? SUCCESS : atoi(entries[i].value);
}

#define CHECKED do { int rc = refusal(__func__); if (rc) return rc; } while (0)

int nvmlInitWithFlags(unsigned int flags) { (void)flags; load(); CHECKED; return SUCCESS; }
int nvmlInit(void) { return nvmlInitWithFlags(0); } /* torch's own, with which it counts cards */
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { CHECKED; return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

static int write_text(char *out, unsigned int size, const char *value)
{
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *out, unsigned int size)
{
    CHECKED;
    return write_text(out, size, text(NULL, "driver", "575.51"));
}

int nvmlDeviceGetCount_v2(unsigned int *count) { CHECKED; *count = number(NULL, "count", 1); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, device_t **device)
{
    CHECKED;
    if (index >= number(NULL, "count", 1))
        return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **device)
{
    CHECKED;
    for (int i = 0; i < DEVICES; i++)
        if (strcmp(text(&devices[i], "uuid", ""), uuid) == 0) {
            *device = &devices[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t *instance, device_t **card)
{
    CHECKED;
    const char *parent = text(instance, "parent", NULL);
    if (parent == NULL)
        return INVALID_ARGUMENT;
    *card = &devices[atoi(parent)];
    return SUCCESS;
}

int nvmlDeviceGetName(device_t *device, char *out, unsigned int size)
{
    CHECKED;
    return write_text(out, size, text(device, "name", "Stand-in"));
}

int nvmlDeviceGetUUID(device_t *device, char *out, unsigned int size)
{
    CHECKED;
    return write_text(out, size, text(device, "uuid", "GPU-none"));
}

int nvmlDeviceGetTotalEnergyConsumption(device_t *device, unsigned long long *millijoules)
{
    CHECKED;
    *millijoules = number(device, "energy", 0);
    return SUCCESS;
}

#define NUMBER(function, what, otherwise) \
    int function(device_t *device, unsigned int *out) \
    { CHECKED; *out = number(device, what, otherwise); return SUCCESS; }

NUMBER(nvmlDeviceGetPowerUsage, "power", 300000)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "limit", 700000)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, "default_limit", 700000)
NUMBER(nvmlDeviceGetPersistenceMode, "persistence", 1)

int nvmlDeviceGetClockInfo(device_t *device, unsigned int clock, unsigned int *megahertz)
{
    CHECKED;
    *megahertz = clock == 1 ? number(device, "sm_clock", 1755) : number(device, "memory_clock", 2619);
    return SUCCESS;
}

int nvmlDeviceGetMaxClockInfo(device_t *device, unsigned int clock, unsigned int *megahertz)
{
    CHECKED;
    *megahertz = clock == 1 ? number(device, "max_sm_clock", 1980) : number(device, "max_memory_clock", 2619);
    return SUCCESS;
}

int nvmlDeviceGetTemperature(device_t *device, unsigned int sensor, unsigned int *degrees)
{
    CHECKED;
    (void)sensor;
    *degrees = number(device, "temperature", 60);
    return SUCCESS;
}

int nvmlDeviceGetTemperatureThreshold(device_t *device, unsigned int kind, unsigned int *degrees)
{
    CHECKED;
    (void)kind;
    *degrees = number(device, "slowdown", 87);
    return SUCCESS;
}

int nvmlDeviceGetEccMode(device_t *device, unsigned int *now, unsigned int *later)
{
    CHECKED;
    *now = *later = number(device, "ecc", 1);
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(device_t *device, unsigned int kind, unsigned int counter, unsigned long long *count)
{
    CHECKED;
    (void)counter;
    *count = number(device, kind ? "uncorrected" : "corrected", 0);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(device_t *device, unsigned int *now, unsigned int *later)
{
    CHECKED;
    *now = *later = number(device, "mig", 0);
    return SUCCESS;
}

int nvmlDeviceGetAPIRestriction(device_t *device, unsigned int what, unsigned int *restricted)
{
    CHECKED;
    (void)what;
    *restricted = number(device, "restricted", 1);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(device_t *device, int *major, int *minor)
{
    CHECKED;
    *major = device->index + 8;
    *minor = 9;
    return SUCCESS;
}

int nvmlDeviceGetViolationStatus(device_t *device, unsigned int policy, violation_t *status)
{
    CHECKED;
    status->reference = 0;
    status->violation = number(device, policy ? "thermal_ns" : "power_ns", 0);
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t *device, unsigned int *count, process_t *out)
{
    CHECKED;
    const char *at = text(device, "processes", "");
    unsigned int found = 0;
    while (*at) {
        if (out && found < *count) {
            const char *colon = strchr(at, ':');
            out[found].pid = atoi(at);
            out[found].bytes = colon && colon[1] != '?' ? strtoull(colon + 1, NULL, 10) : ~0ull;
        }
        found++;
        at += strcspn(at, ",");
        at += *at == ',';
    }
    int fits = found == 0 || (out && found <= *count);
    *count = found;
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetMemoryInfo_v2(device_t *device, memory_v2_t *memory)
{
    CHECKED;
    memory->total = number(device, "total", 80ull << 30);
    memory->reserved = number(device, "reserved", 0);
    memory->used = number(device, "used", 0);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t *device, unsigned long long *mask)
{
    CHECKED;
    *mask = number(device, "reasons", 0);
    return SUCCESS;
}

int nvmlDeviceGetMarginTemperature(device_t *device, margin_t *margin)
{
    CHECKED;
    margin->margin = number(device, "margin", 20);
    return SUCCESS;
}
