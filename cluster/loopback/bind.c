#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

typedef int (*address_function)(int, const struct sockaddr *, socklen_t);

/* Only stream sockets serve here; a datagram socket bound to "any" is often a client's. */
static int is_stream(int fd) {
    int type = 0;
    socklen_t size = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

static int own_address(struct in_addr *own) {
    const char *text = getenv("SATFUSION_BIND_ADDRESS");
    return text && inet_pton(AF_INET, text, own) == 1;
}

/* An IPv4 address in its IPv6 spelling, ::ffff:a.b.c.d, for a socket of both families. */
static void map_address(struct in6_addr *mapped, const struct in_addr *address) {
    memset(mapped, 0, 10);
    memset(mapped->s6_addr + 10, 0xff, 2);
    memcpy(mapped->s6_addr + 12, address, 4);
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    address_function next = (address_function)dlsym(RTLD_NEXT, "bind");
    struct in_addr own;
    if (!address || !own_address(&own) || !is_stream(fd))
        return next(fd, address, length);
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in changed;
        memcpy(&changed, address, sizeof changed);
        if (changed.sin_addr.s_addr == htonl(INADDR_ANY))
            changed.sin_addr = own;
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
        struct sockaddr_in6 changed;
        memcpy(&changed, address, sizeof changed);
        if (IN6_IS_ADDR_UNSPECIFIED(&changed.sin6_addr)) {
            int only_v6 = 0;
            socklen_t size = sizeof only_v6;
            getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only_v6, &size);
            if (only_v6)
                changed.sin6_addr = in6addr_loopback;
            else
                map_address(&changed.sin6_addr, &own);
        }
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    return next(fd, address, length);
}

/* On loopback a connection to a port without a listener is refused at once. */
static int refused_at_localhost(address_function next, in_port_t port) {
    struct sockaddr_in target = {.sin_family = AF_INET, .sin_port = port};
    int refused, saved = errno, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0)
        return 0;
    refused = next(fd, (struct sockaddr *)&target, sizeof target) != 0 && errno == ECONNREFUSED;
    close(fd);
    errno = saved;
    return refused;
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    address_function next = (address_function)dlsym(RTLD_NEXT, "connect");
    struct in_addr own, localhost = {.s_addr = htonl(INADDR_LOOPBACK)};
    if (!address || !own_address(&own) || !is_stream(fd))
        return next(fd, address, length);
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in changed;
        memcpy(&changed, address, sizeof changed);
        if (changed.sin_addr.s_addr == localhost.s_addr && refused_at_localhost(next, changed.sin_port))
            changed.sin_addr = own;
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
        struct sockaddr_in6 changed;
        struct in6_addr mapped;
        memcpy(&changed, address, sizeof changed);
        map_address(&mapped, &localhost);
        if (memcmp(&changed.sin6_addr, &mapped, sizeof mapped) == 0 &&
            refused_at_localhost(next, changed.sin6_port))
            map_address(&changed.sin6_addr, &own);
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    return next(fd, address, length);
}
