/* Counts what a process and its children change on one file system, and cuts its power just before the n-th change.
 *
 * Preloaded: libc's calls that change something are counted when they concern a file of the file system whose device
 * number stands in the control block (see disk.py), a file that all processes map; only those that are made under one
 * label, if that is wanted. At the n-th the file system is shut down as if the power had gone (FS_IOC_SHUTDOWN) and the
 * process is killed; every later change of any process waits for ever. What is written to a stream counts when it is
 * written or closed; changes made through a mapping are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#define FS_IOC_SHUTDOWN 0x8004587dUL
#define LINE 128
#define SHORT 32

enum { WITHOUT_FILE_SYNC = 1, WITHOUT_FOLDER_SYNC = 2 };
enum { CUTTING = 1, CUT = 2, FAILED = 3 };

struct control {
    _Atomic uint64_t armed, count, cut_at, mode, device, sabotage, cut, lines, capacity;
    char mount[256], label[SHORT], only_label[SHORT], label_at_cut[SHORT], cut_call[LINE];
    struct { char label[SHORT], call[LINE]; } line[];
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("POWERCUT_CONTROL");
    struct stat status;
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0 || fstat(fd, &status)) return;
    void *block = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (block != MAP_FAILED) control = block;
}

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))next(#name); real; })

static void wait_for_the_end(void) {
    for (;;) pause();
}

static void cut(const char *call, const char *what) {
    uint32_t mode = control->mode;
    snprintf(control->cut_call, LINE, "%s %s", call, what);
    memcpy(control->label_at_cut, control->label, SHORT);
    int folder = syscall(SYS_openat, AT_FDCWD, control->mount, O_RDONLY | O_DIRECTORY);
    control->cut = CUTTING; /* from here on another thread may end by SIGBUS, for its mapped file is gone */
    control->cut = folder >= 0 && ioctl(folder, FS_IOC_SHUTDOWN, &mode) == 0 ? CUT : FAILED;
    kill(getpid(), SIGKILL);
    wait_for_the_end();
}

static void changes(const char *call, const char *what) {
    if (control->cut) wait_for_the_end();
    if (control->only_label[0] && strncmp(control->label, control->only_label, SHORT)) return;
    uint64_t number = ++control->count, end = control->cut_at;
    if (number <= control->capacity) {
        memcpy(control->line[number - 1].label, control->label, SHORT);
        snprintf(control->line[number - 1].call, LINE, "%s %s", call, what);
        control->lines = number;
    }
    if (end && number == end) cut(call, what);
    if (end && number > end) wait_for_the_end();
}

static int watched(void) { return control && control->armed; }

static void by_fd(const char *call, int fd) {
    struct stat status;
    char link[32], path[256] = "";
    int error = errno;
    if (watched() && fd >= 0 && !fstat(fd, &status) && status.st_dev == control->device) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(link, path, sizeof path - 1);
        path[size > 0 ? size : 0] = 0;
        const char *name = strncmp(path, control->mount, strlen(control->mount)) ? path : path + strlen(control->mount);
        changes(call, name);
    }
    errno = error;
}

/* The file itself, links followed. */
static void by_file(const char *call, int at, const char *path) {
    struct stat status;
    int error = errno;
    if (watched() && path && !fstatat(at, path, &status, 0) && status.st_dev == control->device) changes(call, path);
    errno = error;
}

/* An entry of a folder, whether there is one or not. */
static void by_entry(const char *call, int at, const char *path) {
    struct stat status;
    char folder[4096];
    int error = errno;
    if (watched() && path && strlen(path) < sizeof folder) {
        strcpy(folder, path);
        size_t size = strlen(folder);
        while (size > 1 && folder[size - 1] == '/') folder[--size] = 0;
        char *slash = strrchr(folder, '/');
        if (!slash) strcpy(folder, ".");
        else slash[slash == folder ? 1 : 0] = 0;
        if (!fstatat(at, folder, &status, 0) && status.st_dev == control->device) {
            size_t length = strlen(control->mount);
            changes(call, strncmp(path, control->mount, length) ? path : path + length);
        }
    }
    errno = error;
}

static int leave_out(int fd) {
    struct stat status;
    if (!watched() || !control->sabotage || fstat(fd, &status) || status.st_dev != control->device) return 0;
    return control->sabotage & (S_ISDIR(status.st_mode) ? WITHOUT_FOLDER_SYNC : WITHOUT_FILE_SYNC);
}

#define OPEN_AT(name, parameters, at, arguments) \
    int name parameters { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list list; \
            va_start(list, flags); \
            mode = va_arg(list, int); \
            va_end(list); \
        } \
        if (flags & (O_CREAT | O_TRUNC)) by_entry("open", at, path); \
        return REAL(name) arguments; \
    }
#define OPEN(name) OPEN_AT(name, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
#define OPENAT(name) OPEN_AT(name, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int at, const char *path, int flags) { return openat(at, path, flags); }
int __openat64_2(int at, const char *path, int flags) { return openat64(at, path, flags); }
#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        if (*how != 'r') by_entry("fopen", AT_FDCWD, path); \
        return REAL(name)(path, how); \
    }
FOPEN(fopen) FOPEN(fopen64)

/* Each may write what the stream has buffered. */
#define ON_STREAM(result, name, parameters, arguments) \
    result name parameters { \
        if (watched()) by_fd("stream", fileno(stream)); \
        return REAL(name) arguments; \
    }
#undef fwrite_unlocked
ON_STREAM(size_t, fwrite, (const void *data, size_t size, size_t count, FILE *stream), (data, size, count, stream))
ON_STREAM(size_t, fwrite_unlocked, (const void *data, size_t size, size_t count, FILE *stream), (data, size, count, stream))
ON_STREAM(int, fclose, (FILE *stream), (stream))

#define ON_FD(call, result, name, parameters, fd, arguments) \
    result name parameters { by_fd(call, fd); return REAL(name) arguments; }
ON_FD("write", ssize_t, write, (int fd, const void *data, size_t size), fd, (fd, data, size))
ON_FD("pwrite", ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), fd, (fd, data, size, at))
ON_FD("pwrite", ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), fd, (fd, data, size, at))
ON_FD("writev", ssize_t, writev, (int fd, const struct iovec *parts, int count), fd, (fd, parts, count))
ON_FD("pwritev", ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t at), fd, (fd, parts, count, at))
ON_FD("pwritev", ssize_t, pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), fd, (fd, parts, count, at))
ON_FD("sendfile", ssize_t, sendfile, (int to, int from, off_t *at, size_t size), to, (to, from, at, size))
ON_FD("sendfile", ssize_t, sendfile64, (int to, int from, off64_t *at, size_t size), to, (to, from, at, size))
ON_FD("copy", ssize_t, copy_file_range, (int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags), to, (from, a, to, b, size, flags))
ON_FD("ftruncate", int, ftruncate, (int fd, off_t size), fd, (fd, size))
ON_FD("ftruncate", int, ftruncate64, (int fd, off64_t size), fd, (fd, size))
ON_FD("fallocate", int, fallocate, (int fd, int mode, off_t at, off_t size), fd, (fd, mode, at, size))
ON_FD("fallocate", int, fallocate64, (int fd, int mode, off64_t at, off64_t size), fd, (fd, mode, at, size))
ON_FD("fallocate", int, posix_fallocate, (int fd, off_t at, off_t size), fd, (fd, at, size))
ON_FD("fallocate", int, posix_fallocate64, (int fd, off64_t at, off64_t size), fd, (fd, at, size))
ON_FD("fchmod", int, fchmod, (int fd, mode_t mode), fd, (fd, mode))
ON_FD("fchown", int, fchown, (int fd, uid_t user, gid_t group), fd, (fd, user, group))
ON_FD("futimens", int, futimens, (int fd, const struct timespec times[2]), fd, (fd, times))
ON_FD("fsetxattr", int, fsetxattr, (int fd, const char *name, const void *value, size_t size, int flags), fd, (fd, name, value, size, flags))
ON_FD("sync_file_range", int, sync_file_range, (int fd, off64_t at, off64_t size, unsigned flags), fd, (fd, at, size, flags))

int syncfs(int fd) {
    by_fd("syncfs", fd);
    return watched() && (control->sabotage & WITHOUT_FILE_SYNC) ? 0 : REAL(syncfs)(fd);
}


int fsync(int fd) {
    by_fd("fsync", fd);
    return leave_out(fd) ? 0 : REAL(fsync)(fd);
}

int fdatasync(int fd) {
    by_fd("fdatasync", fd);
    return leave_out(fd) ? 0 : REAL(fdatasync)(fd);
}

void sync(void) {
    if (watched()) changes("sync", "");
    REAL(sync)();
}

#define ON_FILE(call, name, parameters, at, path, arguments) \
    int name parameters { by_file(call, at, path); return REAL(name) arguments; }
ON_FILE("truncate", truncate, (const char *path, off_t size), AT_FDCWD, path, (path, size))
ON_FILE("truncate", truncate64, (const char *path, off64_t size), AT_FDCWD, path, (path, size))
ON_FILE("chmod", chmod, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
ON_FILE("chmod", fchmodat, (int at, const char *path, mode_t mode, int flags), at, path, (at, path, mode, flags))
ON_FILE("chown", chown, (const char *path, uid_t user, gid_t group), AT_FDCWD, path, (path, user, group))
ON_FILE("setxattr", setxattr, (const char *path, const char *name, const void *value, size_t size, int flags), AT_FDCWD, path, (path, name, value, size, flags))

#define ON_ENTRY(call, name, parameters, at, path, arguments) \
    int name parameters { by_entry(call, at, path); return REAL(name) arguments; }
ON_ENTRY("chown", lchown, (const char *path, uid_t user, gid_t group), AT_FDCWD, path, (path, user, group))
ON_ENTRY("chown", fchownat, (int at, const char *path, uid_t user, gid_t group, int flags), at, path, (at, path, user, group, flags))
ON_ENTRY("utimens", utimensat, (int at, const char *path, const struct timespec times[2], int flags), at, path, (at, path, times, flags))
ON_ENTRY("rename", rename, (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_ENTRY("rename", renameat, (int a, const char *from, int b, const char *to), b, to, (a, from, b, to))
ON_ENTRY("rename", renameat2, (int a, const char *from, int b, const char *to, unsigned flags), b, to, (a, from, b, to, flags))
ON_ENTRY("unlink", unlink, (const char *path), AT_FDCWD, path, (path))
ON_ENTRY("unlink", unlinkat, (int at, const char *path, int flags), at, path, (at, path, flags))
ON_ENTRY("remove", remove, (const char *path), AT_FDCWD, path, (path))
ON_ENTRY("rmdir", rmdir, (const char *path), AT_FDCWD, path, (path))
ON_ENTRY("mkdir", mkdir, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
ON_ENTRY("mkdir", mkdirat, (int at, const char *path, mode_t mode), at, path, (at, path, mode))
ON_ENTRY("symlink", symlink, (const char *target, const char *path), AT_FDCWD, path, (target, path))
ON_ENTRY("symlink", symlinkat, (const char *target, int at, const char *path), at, path, (target, at, path))
ON_ENTRY("link", link, (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_ENTRY("link", linkat, (int a, const char *from, int b, const char *to, int flags), b, to, (a, from, b, to, flags))
ON_ENTRY("mknod", mknod, (const char *path, mode_t mode, dev_t device), AT_FDCWD, path, (path, mode, device))
ON_ENTRY("mkfifo", mkfifo, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
