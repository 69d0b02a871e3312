/* Faults of storage, put between a program and libc by LD_PRELOAD: storage.py compiles it, sets its orders and reads
 * its count. Operations on files below FAULTY_ROOT are counted, in all processes together; from the operation `at` on,
 * `span` of them (0: all) fail as `kind` says. With FAULTY_SHADOW what fsync has made safe is copied there, so that
 * afterwards a loss of power can be played: a file's bytes under its key, a folder's list of keys, kinds and names.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NOTHING, FULL, READ_ONLY, WRITE_ERROR, READ_ERROR, SHORT_WRITE, VANISH, POWER };
enum operation { WRITE = 1, READ = 2, CREATE = 4, CHANGE = 8, SYNC = 16, OPEN = 32 };  /* CHANGE: of names */

struct orders {  /* storage.py has the same */
    int64_t kind, at, span;
    int64_t lies_from;  /* from this operation on fsync does nothing, and says that it did */
    _Atomic int64_t count, failed;
    _Atomic int64_t counts[6];  /* by operation, whatever the kind */
};

static struct orders none, *orders = &none;
static const char *root, *shadow;
static size_t root_length;

/* Which operations a kind counts, and fails. */
static const int concerned[] = {
    [FULL] = WRITE | CREATE, [READ_ONLY] = WRITE | CREATE | CHANGE, [WRITE_ERROR] = WRITE | SYNC, [READ_ERROR] = READ,
    [SHORT_WRITE] = WRITE, [VANISH] = OPEN, [POWER] = WRITE | CREATE | CHANGE | SYNC};
static const int error_of[] = {[FULL] = ENOSPC, [READ_ONLY] = EROFS, [WRITE_ERROR] = EIO, [READ_ERROR] = EIO};

#define REAL(name) ((__typeof__(name) *)real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("FAULTY_ORDERS");
    root = getenv("FAULTY_ROOT"), shadow = getenv("FAULTY_SHADOW");
    if (!file || !root) return;
    root_length = strlen(root);
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
    void *mapped = fd < 0 ? MAP_FAILED : mmap(0, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped != MAP_FAILED) orders = mapped;
    if (fd >= 0) syscall(SYS_close, fd);
}

static int below_root(const char *path) {
    return root && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* The path of a file descriptor; 0 where it has none. */
static int path_of(int fd, char path[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int fd_concerned(int fd) {
    char path[PATH_MAX];
    return root && path_of(fd, path) && below_root(path);
}

static int path_concerned(int folder, const char *name) {
    char path[2 * PATH_MAX];
    if (!root || !name) return 0;
    if (*name == '/') return below_root(name);
    if (folder == AT_FDCWD ? !getcwd(path, PATH_MAX) : !path_of(folder, path)) return 0;
    strcat(path, "/");
    strncat(path, name, PATH_MAX - 1);
    return below_root(path);
}

/* Count an operation. Returns the error that it ends with, -1 where it is to be done otherwise, 0 where it is done. */
static int fault(int operation) {
    int kind = orders->kind;
    atomic_fetch_add(&orders->counts[__builtin_ctz(operation)], 1);
    if (!kind || !(concerned[kind] & operation)) return 0;
    int64_t number = atomic_fetch_add(&orders->count, 1) + 1;
    if (!orders->at || number < orders->at || (orders->span && number >= orders->at + orders->span)) return 0;
    atomic_fetch_add(&orders->failed, 1);
    if (kind == POWER) kill(0, SIGKILL);
    return kind == SHORT_WRITE || kind == VANISH ? -1 : error_of[kind];
}

#define FAIL(error) return errno = (error), -1

/* "INODE-BIRTH": unlike an inode's number it does not come again. */
int faulty_key(const char *path, char *key, size_t size) {
    struct statx about;
    if (statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_INO | STATX_BTIME, &about)) return -1;
    snprintf(key, size, "%llu-%lld.%u", (unsigned long long)about.stx_ino, (long long)about.stx_btime.tv_sec,
             about.stx_btime.tv_nsec);
    return 0;
}

static void keep(const char *path, int is_folder) {
    char key[128], arriving[PATH_MAX], target[PATH_MAX], entry[2 * PATH_MAX], buffer[1 << 16];
    if (faulty_key(path, key, sizeof key)) return;
    snprintf(target, sizeof target, "%s/%s", shadow, key);
    snprintf(arriving, sizeof arriving, "%s/.%s-%d", shadow, key, (int)gettid());
    int out = syscall(SYS_openat, AT_FDCWD, arriving, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (is_folder) {
        DIR *folder = opendir(path);
        for (struct dirent *found; folder && (found = readdir(folder));) {
            if (!strcmp(found->d_name, ".") || !strcmp(found->d_name, "..")) continue;
            snprintf(entry, sizeof entry, "%s/%s", path, found->d_name);
            if (faulty_key(entry, key, sizeof key)) continue;
            int length = snprintf(buffer, sizeof buffer, "%s %c %s\n", key, found->d_type == DT_DIR ? 'd' : 'f',
                                  found->d_name);
            if (syscall(SYS_write, out, buffer, length) != length) abort();
        }
        if (folder) closedir(folder);
    } else {
        int in = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
        for (ssize_t length; in >= 0 && (length = syscall(SYS_read, in, buffer, sizeof buffer)) > 0;)
            if (syscall(SYS_write, out, buffer, length) != length) abort();
        if (in >= 0) syscall(SYS_close, in);
    }
    syscall(SYS_close, out);
    syscall(SYS_renameat2, AT_FDCWD, arriving, AT_FDCWD, target, 0);
}

static int synced(int fd, int result) {
    char path[PATH_MAX];
    struct stat about;
    if (result || !shadow || !path_of(fd, path) || !below_root(path) || fstat(fd, &about)) return result;
    if (orders->lies_from && orders->count >= orders->lies_from) return result;
    keep(path, S_ISDIR(about.st_mode));
    return result;
}

#define SYNC_CALL(name)                                                   \
    int name(int fd) {                                                    \
        int error = fd_concerned(fd) ? fault(SYNC) : 0;                   \
        if (error > 0) FAIL(error);                                       \
        return synced(fd, REAL(name)(fd));                                \
    }
SYNC_CALL(fsync)
SYNC_CALL(fdatasync)

/* Opening. */
static int before_open(int folder, const char *path, int flags) {
    struct stat about;
    if (!path_concerned(folder, path)) return 0;
    int there = !fstatat(folder, path, &about, 0);
    if (flags & O_CREAT && !there) return fault(CREATE);
    if (orders->kind == READ_ONLY && (flags & O_ACCMODE) != O_RDONLY) return fault(CREATE);
    if (there && S_ISREG(about.st_mode) && (flags & O_ACCMODE) == O_RDONLY && fault(OPEN) < 0)
        syscall(SYS_unlinkat, folder, path, 0);
    return 0;
}

#define MODE(flags)                                                       \
    mode_t mode = 0;                                                      \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode = va_arg(rest, mode_t);                                      \
        va_end(rest);                                                     \
    }
#define OPEN_CALL(name)                                                   \
    int name(const char *path, int flags, ...) {                          \
        MODE(flags)                                                       \
        int error = before_open(AT_FDCWD, path, flags);                   \
        if (error > 0) FAIL(error);                                       \
        return REAL(name)(path, flags, mode);                             \
    }
#define OPENAT_CALL(name)                                                 \
    int name(int folder, const char *path, int flags, ...) {              \
        MODE(flags)                                                       \
        int error = before_open(folder, path, flags);                     \
        if (error > 0) FAIL(error);                                       \
        return REAL(name)(folder, path, flags, mode);                     \
    }
OPEN_CALL(open)
OPEN_CALL(open64)
OPENAT_CALL(openat)
OPENAT_CALL(openat64)

#define FOPEN_CALL(name)                                                  \
    FILE *name(const char *path, const char *how) {                       \
        int writes = strpbrk(how, "wa+") != 0;                            \
        int error = before_open(AT_FDCWD, path, writes ? O_RDWR | (*how == 'r' ? 0 : O_CREAT) : O_RDONLY); \
        if (error > 0) return errno = error, NULL;                        \
        return REAL(name)(path, how);                                     \
    }
FOPEN_CALL(fopen)
FOPEN_CALL(fopen64)

/* Writing. A short write is half of what was asked for, but for what can't be halved. */
#define BEFORE_WRITE(fd, size)                                            \
    int error = fd_concerned(fd) ? fault(WRITE) : 0;                      \
    if (error > 0) FAIL(error);                                           \
    if (error < 0 && (size) > 1) (size) /= 2;
ssize_t write(int fd, const void *data, size_t size) {
    BEFORE_WRITE(fd, size)
    return REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    BEFORE_WRITE(fd, size)
    return REAL(pwrite)(fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    BEFORE_WRITE(fd, size)
    return REAL(pwrite64)(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    BEFORE_WRITE(fd, count)
    return REAL(writev)(fd, parts, count);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    BEFORE_WRITE(fd, count)
    return REAL(pwritev)(fd, parts, count, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    BEFORE_WRITE(fd, count)
    return REAL(pwritev64)(fd, parts, count, offset);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    BEFORE_WRITE(to, size)
    return (ssize_t)syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    BEFORE_WRITE(to, size)
    return (ssize_t)syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t *begin, int to, off64_t *end, size_t size, unsigned flags) {
    BEFORE_WRITE(to, size)
    return (ssize_t)syscall(SYS_copy_file_range, from, begin, to, end, size, flags);
}
int ftruncate(int fd, off_t size) {
    int error = fd_concerned(fd) ? fault(WRITE) : 0;
    if (error > 0) FAIL(error);
    return REAL(ftruncate)(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    int error = fd_concerned(fd) ? fault(WRITE) : 0;
    if (error > 0) FAIL(error);
    return REAL(ftruncate64)(fd, size);
}

/* Reading. */
#define BEFORE_READ(fd)                                                   \
    int error = fd_concerned(fd) ? fault(READ) : 0;                       \
    if (error > 0) FAIL(error);
ssize_t read(int fd, void *data, size_t size) {
    BEFORE_READ(fd)
    return REAL(read)(fd, data, size);
}
ssize_t __read_chk(int fd, void *data, size_t size, size_t room) {
    (void)room;
    BEFORE_READ(fd)
    return REAL(read)(fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    BEFORE_READ(fd)
    return REAL(pread)(fd, data, size, offset);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    BEFORE_READ(fd)
    return REAL(pread64)(fd, data, size, offset);
}
ssize_t readv(int fd, const struct iovec *parts, int count) {
    BEFORE_READ(fd)
    return REAL(readv)(fd, parts, count);
}

/* Names. */
#define BEFORE_CHANGE(folder, path, operation)                            \
    int error = path_concerned(folder, path) ? fault(operation) : 0;      \
    if (error > 0) FAIL(error);
int rename(const char *from, const char *to) {
    BEFORE_CHANGE(AT_FDCWD, to, CHANGE)
    return REAL(rename)(from, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    BEFORE_CHANGE(to_folder, to, CHANGE)
    return REAL(renameat)(from_folder, from, to_folder, to);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    BEFORE_CHANGE(to_folder, to, CHANGE)
    return REAL(renameat2)(from_folder, from, to_folder, to, flags);
}
int unlink(const char *path) {
    BEFORE_CHANGE(AT_FDCWD, path, CHANGE)
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    BEFORE_CHANGE(folder, path, CHANGE)
    return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    BEFORE_CHANGE(AT_FDCWD, path, CHANGE)
    return REAL(rmdir)(path);
}
int mkdir(const char *path, mode_t mode) {
    BEFORE_CHANGE(AT_FDCWD, path, CREATE)
    return REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    BEFORE_CHANGE(folder, path, CREATE)
    return REAL(mkdirat)(folder, path, mode);
}
