"""The names and numbers that the built-in seccomp profiles are made of: data only.

A name that an architecture lacks (arm64 has no open or fork) is skipped there. What to do when the
kernel gains a system call: nothing, it is answered ENOSYS. To open or to name it, add it to RECENT
and to one of the lists below.
"""

# Calls that libseccomp 2.5 may be too old to know. Since 424 a call has one number everywhere.
_FROM_440 = """
    process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset
    landlock_add_rule landlock_restrict_self memfd_secret process_mrelease futex_waitv
    set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake
    futex_wait futex_requeue statmount listmount lsm_get_self_attr
    lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat
    listxattrat removexattrat open_tree_attr file_getattr file_setattr
    listns rseq_slice_yield
"""
RECENT = {name: number for number, name in enumerate(_FROM_440.split(), start=440)}

# Denied in every profile. Each is a way to more privilege or to something the sandbox shares with
# the host, or a part of the kernel too large for what programs in a sandbox need it for. adjtimex
# is among them because whether it reads or writes is said in memory; unshare, because its flags
# reuse bits of those of clone, and a new one means a namespace again (UNSHARE_EMPTY_MNTNS).
DENIED = """
    io_uring_setup io_uring_enter io_uring_register
    keyctl add_key request_key
    bpf userfaultfd perf_event_open
    process_vm_readv process_vm_writev pidfd_getfd kcmp
    mount umount2 pivot_root chroot open_tree open_tree_attr move_mount mount_setattr
    fsopen fsconfig fsmount fspick statmount listmount
    setns unshare listns
    open_by_handle_at name_to_handle_at
    init_module finit_module delete_module kexec_load kexec_file_load
    settimeofday clock_settime adjtimex clock_adjtime
    quotactl quotactl_fd swapon swapoff reboot acct syslog vhangup
    move_pages migrate_pages
    iopl ioperm fanotify_init fanotify_mark
    lookup_dcookie nfsservctl sethostname setdomainname
"""

# One program and its children computing: files, memory, threads, processes, signals, time, pipes.
MINIMAL = """
    access faccessat faccessat2 open openat openat2 creat close close_range umask
    read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek
    stat fstat lstat newfstatat statx statfs fstatfs truncate ftruncate fallocate
    fadvise64 readahead copy_file_range sendfile fsync fdatasync sync_file_range
    fcntl flock dup dup2 dup3 getdents getdents64 getcwd chdir fchdir
    mkdir mkdirat rmdir mknod mknodat link linkat symlink symlinkat unlink unlinkat
    rename renameat renameat2 readlink readlinkat chmod fchmod fchmodat fchmodat2
    chown fchown lchown fchownat utime utimes futimesat utimensat
    getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat
    listxattr llistxattr flistxattr listxattrat
    removexattr lremovexattr fremovexattr removexattrat file_getattr file_setattr

    brk mmap munmap mremap mprotect madvise msync mincore mlock mlock2 munlock
    mlockall munlockall memfd_create pkey_alloc pkey_free pkey_mprotect
    map_shadow_stack mseal membarrier

    futex futex_waitv futex_wait futex_wake futex_requeue get_robust_list
    set_robust_list set_tid_address gettid rseq arch_prctl
    sched_yield sched_getaffinity sched_setaffinity getcpu getpriority setpriority
    sched_getparam sched_getscheduler sched_get_priority_min sched_get_priority_max

    fork vfork execve execveat exit exit_group wait4 waitid restart_syscall
    pidfd_open pidfd_send_signal
    getpid getppid getpgid getpgrp setpgid getsid setsid capget capset
    getuid geteuid getgid getegid getresuid getresgid getgroups
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups
    getrlimit setrlimit getrusage times uname sysinfo getrandom

    rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigsuspend
    rt_sigreturn rt_sigqueueinfo rt_tgsigqueueinfo sigaltstack
    kill tkill tgkill pause signalfd signalfd4

    time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep
    alarm getitimer setitimer timer_create timer_settime timer_gettime
    timer_getoverrun timer_delete timerfd_create timerfd_settime timerfd_gettime

    pipe pipe2 poll ppoll select pselect6 eventfd eventfd2
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    sendto sendmsg recvfrom recvmsg shutdown getsockopt getsockname getpeername
"""

# What standard has on top: the network, IPC, file watching, scheduling, own sandboxing.
STANDARD = """
    bind connect listen accept accept4 sendmmsg recvmmsg
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
    splice tee vmsplice sync syncfs
    shmget shmat shmdt shmctl semget semop semtimedop semctl
    msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    sched_setparam sched_setscheduler sched_getattr sched_setattr
    sched_rr_get_interval ioprio_get ioprio_set get_mempolicy
    seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""

# What full has on top: the rare and the old. Asynchronous I/O is here and not in standard because
# /proc/sys/fs/aio-max-nr is one number for the whole host.
FULL = """
    io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents
    mbind set_mempolicy set_mempolicy_home_node
    process_madvise process_mrelease memfd_secret remap_file_pages cachestat
    lsm_get_self_attr lsm_list_modules modify_ldt rseq_slice_yield
    ustat sysfs
"""

# What init and the launchers of a living sandbox call themselves, from csrc/. A policy that allows all of it
# is loaded once and inherited by every command; another is loaded by each command.
LAUNCHER = """
    capset chdir clock_gettime close close_range dup3 eventfd2 execve exit_group fchdir fchmod fchmodat
    fcntl fstat fstatfs ftruncate getcwd getdents64 getpid kill mkdirat mmap munmap newfstatat openat
    openat2 pidfd_open pipe2 ppoll pread64 preadv2 pwrite64 pwritev2 read readlinkat recvmsg renameat2
    rt_sigprocmask sendmsg sendto setfsgid setfsuid setresgid setresuid setsid symlinkat umask unlinkat
    vfork wait4 write
"""
LAUNCHER_RULES = "clone ioctl prctl prlimit64"

# Options of prctl, in the order of linux/prctl.h.
PRCTL_MINIMAL = (
    *(1, 2, 3, 4),  # SET, GET_PDEATHSIG; GET, SET_DUMPABLE
    *(15, 16),  # SET, GET_NAME
    *(21, 23),  # GET_SECCOMP, CAPBSET_READ
    *(29, 30),  # SET, GET_TIMERSLACK
    *(36, 37),  # SET, GET_CHILD_SUBREAPER
    *(38, 39),  # SET, GET_NO_NEW_PRIVS
    *(40, 41, 42),  # GET_TID_ADDRESS; SET, GET_THP_DISABLE
    *(50, 51, 63, 64),  # SVE_SET, SVE_GET, SME_SET, SME_GET_VL
    52,  # GET_SPECULATION_CTRL
    *(54, 55, 56, 60, 61),  # arm64: PAC_RESET_KEYS, TAGGED_ADDR_CTRL, PAC_ENABLED_KEYS
    *(65, 66),  # SET, GET_MDWE
    *(74, 75, 76),  # GET, SET, LOCK_SHADOW_STACK_STATUS
    0x41555856,  # GET_AUXV
    0x53564D41,  # SET_VMA: names of mappings
)
PRCTL_STANDARD = (
    *(7, 8),  # GET, SET_KEEPCAPS
    *(22, 24),  # SET_SECCOMP, CAPBSET_DROP
    *(25, 27, 28),  # GET_TSC; GET, SET_SECUREBITS
    47,  # CAP_AMBIENT
    0x59616D61,  # SET_PTRACER
)
# Not SET_MM (rewrites what /proc tells about a process), SET_IO_FLUSHER (kernel memory reserves),
# SCHED_CORE (idles the sibling of a CPU), SET_MEMORY_MERGE (shares pages with the host).
PRCTL_FULL = (
    *(
        5,
        6,
        9,
        10,
        11,
        12,
        13,
        14,
        19,
        20,
        45,
        46,
    ),  # UNALIGN, FPEMU, FPEXC, TIMING, ENDIAN, FP_MODE
    26,  # SET_TSC
    *(33, 34),  # MCE_KILL, MCE_KILL_GET
    *(53, 58, 59),  # SET_SPECULATION_CTRL, GET_IO_FLUSHER, SET_SYSCALL_USER_DISPATCH
    68,  # GET_MEMORY_MERGE
    *(78, 79),  # FUTEX_HASH, RSEQ_SLICE_EXTENSION
)
