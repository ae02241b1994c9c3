/* The other end of every measurement, as fast as the kernel lets it be.
 *
 * One command per line on standard input, one answer per line on standard output:
 *
 *   peers N                  be N peers, each with an address and a mark of its own
 *   fill PORT SIZE COUNT     send COUNT datagrams to 127.0.0.1, peer by peer
 *   pace PORT SIZE COUNT HZ  the same, at a steady rate
 *   echo PORT SIZE COUNT     send one, wait for it to come back, COUNT times; answers p50 and p99
 *   visit PORT FIRST COUNT   send one datagram from each of COUNT addresses
 *   connect PORT COUNT       open COUNT TCP connections
 *   drop                     close them
 *
 * Built as a library it is the floor: drain() receives with recvmmsg and does nothing else.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define FIRST_SPI 0x1001

long drain(int fd, long count)
{
    static char payload[BATCH][65536], control[BATCH][64];
    static struct sockaddr_in names[BATCH];
    struct mmsghdr headers[BATCH];
    struct iovec pieces[BATCH];
    long got = 0;

    while (got < count) {
        for (int i = 0; i < BATCH; i++) {
            pieces[i] = (struct iovec){payload[i], sizeof payload[i]};
            headers[i].msg_hdr = (struct msghdr){
                .msg_name = &names[i], .msg_namelen = sizeof names[i],
                .msg_iov = &pieces[i], .msg_iovlen = 1,
                .msg_control = control[i], .msg_controllen = sizeof control[i]};
        }
        int n = recvmmsg(fd, headers, BATCH, MSG_DONTWAIT, NULL);
        if (n < 0)
            return errno == EAGAIN ? got : -errno;
        got += n;
    }
    return got;
}

static int peers[4096], peer_count, connections[65536], connection_count;
static char data[65536];

static struct sockaddr_in at(uint32_t host, int port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(port)};
    name.sin_addr.s_addr = htonl(host);
    return name;
}

static struct sockaddr_in here(int port) { return at(INADDR_LOOPBACK, port); }

static void fail(const char *what)
{
    printf("error %s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(1);
}

static int open_peer(uint32_t host, uint32_t spi)
{
    struct sockaddr_in name = at(host, 0);
    uint32_t mark = htonl(spi);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);

    if (fd < 0 || bind(fd, (struct sockaddr *)&name, sizeof name))
        fail("bind");
    if (setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof mark) && errno != EPERM)
        fail("SO_MARK");
    return fd;
}

/* The first peer is 127.0.0.1; the others have 127.1.0.1 and what follows. */
static void open_peers(int count)
{
    for (int i = 0; i < peer_count; i++)
        close(peers[i]);
    for (peer_count = 0; peer_count < count; peer_count++) {
        uint32_t host = peer_count ? (127u << 24 | 1 << 16) + peer_count : INADDR_LOOPBACK;
        peers[peer_count] = open_peer(host, FIRST_SPI + peer_count);
    }
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void fill(int port, int size, long count)
{
    struct sockaddr_in to = here(port);
    struct iovec piece = {data, size};
    struct mmsghdr headers[BATCH];

    for (int i = 0; i < BATCH; i++)
        headers[i].msg_hdr = (struct msghdr){
            .msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &piece, .msg_iovlen = 1};
    /* One peer sends in batches; of many each sends one in its turn. */
    for (long sent = 0; sent < count;) {
        int want = peer_count > 1 ? 1 : count - sent < BATCH ? count - sent : BATCH;
        int n = sendmmsg(peers[sent % peer_count], headers, want, 0);
        if (n < 0)
            fail("send");
        sent += n;
    }
}

static void pace(int port, int size, long count, long rate)
{
    struct sockaddr_in to = here(port);
    int64_t start = now();

    for (long i = 0; i < count; i++) {
        while (now() < start + i * 1000000000ll / rate)
            ;
        if (sendto(peers[i % peer_count], data, size, 0, (struct sockaddr *)&to, sizeof to) < 0)
            fail("send");
    }
}

static int by_size(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void echo(int port, int size, long count)
{
    struct sockaddr_in to = here(port);
    int64_t *times = malloc(count * sizeof *times);
    char back[65536];

    for (long i = 0; i < count; i++) {
        int fd = peers[i % peer_count];
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        int64_t start = now();
        if (sendto(fd, data, size, 0, (struct sockaddr *)&to, sizeof to) < 0)
            fail("send");
        if (poll(&ready, 1, 2000) != 1 || recv(fd, back, sizeof back, 0) != size)
            fail("echo");
        times[i] = now() - start;
    }
    qsort(times, count, sizeof *times, by_size);
    printf("ok %lld %lld\n", (long long)times[count / 2], (long long)times[count * 99 / 100]);
    free(times);
}

static void visit(int port, long first, long count)
{
    struct sockaddr_in to = here(port);

    for (long i = first; i < first + count; i++) {
        int fd = open_peer((127u << 24 | 64 << 16) + i, FIRST_SPI);
        if (sendto(fd, data, 16, 0, (struct sockaddr *)&to, sizeof to) < 0)
            fail("send");
        close(fd);
    }
}

static void drop(void)
{
    struct linger hard = {1, 0};

    while (connection_count) {
        int fd = connections[--connection_count];
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        close(fd);
    }
}

static void open_connections(int port, long count)
{
    struct sockaddr_in to = here(port);
    uint32_t mark = htonl(FIRST_SPI);

    for (long i = 0; i < count; i++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0)
            fail("socket");
        setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof mark);
        if (connect(fd, (struct sockaddr *)&to, sizeof to))
            fail("connect");
        connections[connection_count++] = fd;
    }
}

int main(void)
{
    char line[256], verb[16];
    long a, b, c, d;

    memset(data, 'x', sizeof data);
    while (fgets(line, sizeof line, stdin)) {
        a = b = c = d = 0;
        if (sscanf(line, "%15s %ld %ld %ld %ld", verb, &a, &b, &c, &d) < 1)
            continue;
        if (!strcmp(verb, "echo")) {
            echo(a, b, c);
            fflush(stdout);
            continue;
        }
        if (!strcmp(verb, "peers"))
            open_peers(a);
        else if (!strcmp(verb, "fill"))
            fill(a, b, c);
        else if (!strcmp(verb, "pace"))
            pace(a, b, c, d);
        else if (!strcmp(verb, "visit"))
            visit(a, b, c);
        else if (!strcmp(verb, "connect"))
            open_connections(a, b);
        else if (!strcmp(verb, "drop"))
            drop();
        puts("ok");
        fflush(stdout);
    }
    return 0;
}
