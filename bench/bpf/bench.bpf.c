// SPDX-License-Identifier: GPL-2.0 OR MIT
// The bench's own programs: a generator of frames, a sink that counts, one that looks at the time between
// arrivals, and the ceiling: a relay that does nothing.
//
// Helpers and types are declared by hand, so that no headers but the compiler's are needed.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define UINT(name, value) int(*name)[value]
#define TYPE(name, value) value *name

static void *(*map_lookup_elem)(void *map, const void *key) = (void *)1;
static u64 (*ktime_get_ns)(void) = (void *)5;
static u64 (*ktime_get_tai_ns)(void) = (void *)208;
static long (*redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*redirect_map)(void *map, u64 key, u64 flags) = (void *)51;

enum { MAP_TYPE_ARRAY = 2, MAP_TYPE_PERCPU_ARRAY = 6, MAP_TYPE_DEVMAP = 14 };
enum { BROADCAST = 8 };
enum { ABORTED = 0, DROP = 1, PASS = 2 };
enum { ETH_IPV4 = 0x0800, UDP = 17, HEADERS = 14 + 20 + 8 };

struct xdp_md {
    u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex;
};

struct headers {
    u8 to[6], from[6];
    u16 ethertype;
    u8 version, tos;
    u16 ip_length, id, fragment;
    u8 ttl, protocol;
    u16 ip_sum;
    u32 source, destination;
    u16 source_port, destination_port, udp_length, udp_sum;
} __attribute__((packed));

_Static_assert(sizeof(struct headers) == HEADERS, "headers of Ethernet, IPv4 and UDP");

// Set at load. Addresses are in this machine's byte order.
const volatile u32 target_ifindex = 0;
const volatile u32 source_address = 0;
const volatile u32 first_group = 0;
const volatile u32 destination_port = 0;
const volatile u32 payload_bytes = 0;
const volatile u32 streams = 1;
const volatile u32 burst_gap_ns = 0;
const volatile u32 tai_offset_seconds = 0;

// One CPU runs the generator, with softirqs off: no two write at a time.
struct generator {
    u64 sent;
    u64 next;
    u64 stream;
};

struct {
    UINT(type, MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct generator);
} generator_state SEC(".maps");

// Time between two frames in 1/1024 ns; 0: as fast as it goes. It may change while frames are made.
struct {
    UINT(type, MAP_TYPE_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, u64);
} generator_interval SEC(".maps");

// What came to the sink: datagrams, bytes of frames, and when the first came since it was set to 0.
struct arrivals {
    u64 datagrams;
    u64 bytes;
    u64 first_ns;
};

struct {
    UINT(type, MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct arrivals);
} arrived SEC(".maps");

// Four buckets an octave: value v is in bucket 4 e + m, where e and m are its exponent and the two bits below the
// leading one; values below 4 are in the buckets 0 to 3.
enum { BUCKETS = 256 };

// How arrivals follow one another: gaps in ns between two, and the lengths of bursts, which are datagrams less than
// burst_gap_ns apart.
struct spacing {
    u64 last_ns;
    u64 burst;
    u64 gaps[BUCKETS];
    u64 bursts[BUCKETS];
};

struct {
    UINT(type, MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct spacing);
} spacings SEC(".maps");

// How long ago arrivals were sent, in ns, by the stamp in the payload of `mcr gen`.
struct delays {
    u64 buckets[BUCKETS];
};

struct {
    UINT(type, MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, struct delays);
} delays SEC(".maps");

INLINE u16 big16(u16 value) { return __builtin_bswap16(value); }
INLINE u32 big32(u32 value) { return __builtin_bswap32(value); }

INLINE u32 folded(u32 sum)
{
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

// Frames are recycled with what the relay wrote into them: each is written anew.
SEC("xdp") int generate(struct xdp_md *context)
{
    struct headers *headers = (void *)(u64)context->data;
    void *end = (void *)(u64)context->data_end;
    u32 key = 0;
    struct generator *state = map_lookup_elem(&generator_state, &key);

    u64 *pace = map_lookup_elem(&generator_interval, &key);

    if (!state || !pace || (void *)(headers + 1) > end)
        return ABORTED;
    u64 interval = *pace;
    if (interval) {
        u64 now = ktime_get_ns() << 10;
        if (now < state->next)
            return DROP;
        // What was missed while nobody called is not made up for, but for a short burst.
        u64 earliest = now - 32 * interval;
        state->next = (state->next > earliest ? state->next : earliest) + interval;
    }
    u32 group = first_group + (u32)state->stream;
    state->stream = state->stream + 1 < streams ? state->stream + 1 : 0;
    state->sent++;

    u16 ip_length = payload_bytes + 28;
    u32 sum = 0x4500 + ip_length + 0x4000 + (16 << 8 | UDP) + (source_address >> 16) +
              (source_address & 0xffff) + (group >> 16) + (group & 0xffff);
    headers->to[0] = 0x01;
    headers->to[1] = 0x00;
    headers->to[2] = 0x5e;
    headers->to[3] = group >> 16 & 0x7f;
    headers->to[4] = group >> 8;
    headers->to[5] = group;
    headers->from[0] = 0x02;
    headers->from[1] = 0;
    headers->from[2] = 0;
    headers->from[3] = 0;
    headers->from[4] = 0;
    headers->from[5] = 1;
    headers->ethertype = big16(ETH_IPV4);
    headers->version = 0x45;
    headers->tos = 0;
    headers->ip_length = big16(ip_length);
    headers->id = 0;
    headers->fragment = big16(0x4000);
    headers->ttl = 16;
    headers->protocol = UDP;
    headers->ip_sum = big16(~folded(sum));
    headers->source = big32(source_address);
    headers->destination = big32(group);
    headers->source_port = big16(4000);
    headers->destination_port = big16(destination_port);
    headers->udp_length = big16(payload_bytes + 8);
    // None, which IPv4 allows.
    headers->udp_sum = 0;
    return redirect(target_ifindex, 0);
}

INLINE int is_udp(struct xdp_md *context)
{
    struct headers *headers = (void *)(u64)context->data;
    void *end = (void *)(u64)context->data_end;
    return (void *)(headers + 1) <= end && headers->ethertype == big16(ETH_IPV4) && headers->protocol == UDP;
}

SEC("xdp") int count(struct xdp_md *context)
{
    u32 key = 0;
    struct arrivals *arrivals;

    if (!is_udp(context))
        return PASS;
    arrivals = map_lookup_elem(&arrived, &key);
    if (!arrivals)
        return ABORTED;
    arrivals->datagrams++;
    arrivals->bytes += context->data_end - context->data;
    if (!arrivals->first_ns)
        arrivals->first_ns = ktime_get_ns();
    return DROP;
}

INLINE u64 bucket(u64 value)
{
    u64 rest = value;
    u32 exponent = 0;

    if (rest < 4)
        return rest;
    for (u32 step = 32; step; step >>= 1) {
        if (rest >> step) {
            rest >>= step;
            exponent += step;
        }
    }
    return 4 * exponent + (value >> (exponent - 2) & 3);
}

INLINE void record(u64 *buckets, u64 value)
{
    u64 index = bucket(value);

    // The verifier is to see what the compiler knows.
    asm volatile("%0 &= 255" : "+r"(index));
    buckets[index]++;
}

SEC("xdp") int space(struct xdp_md *context)
{
    u32 key = 0;
    struct spacing *spacing;

    if (!is_udp(context))
        return PASS;
    spacing = map_lookup_elem(&spacings, &key);
    if (!spacing)
        return ABORTED;
    u64 now = ktime_get_ns(), gap = now - spacing->last_ns;
    if (spacing->last_ns) {
        record(spacing->gaps, gap);
        if (gap >= burst_gap_ns) {
            record(spacing->bursts, spacing->burst);
            spacing->burst = 0;
        }
    }
    spacing->last_ns = now;
    spacing->burst++;
    return DROP;
}

SEC("xdp") int delay(struct xdp_md *context)
{
    u64 *sent = (void *)(u64)context->data + HEADERS + 32;
    u32 key = 0;
    struct delays *found;
    u64 now = ktime_get_tai_ns() - tai_offset_seconds * 1000000000ull;

    if (!is_udp(context) || (void *)(sent + 1) > (void *)(u64)context->data_end)
        return PASS;
    found = map_lookup_elem(&delays, &key);
    if (!found)
        return ABORTED;
    record(found->buckets, now - __builtin_bswap64(*sent));
    return DROP;
}

SEC("xdp") int ceiling(struct xdp_md *context)
{
    return is_udp(context) ? redirect(target_ifindex, 0) : PASS;
}

// The devices of the outputs, one as often as it has outputs. A broadcast walks the whole map: it is made for so many.
struct {
    UINT(type, MAP_TYPE_DEVMAP);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, u32);
} fan SEC(".maps");

SEC("xdp") int fan_ceiling(struct xdp_md *context)
{
    return is_udp(context) ? redirect_map(&fan, 0, BROADCAST) : PASS;
}

char gpl_compatible[] SEC("license") = "Dual MIT/GPL";
