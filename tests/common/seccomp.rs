//! A seccomp filter, as containers have it.
#![allow(unsafe_code, reason = "the filter is set between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes a system call fail for the command and all that it starts.
pub fn deny(command: &mut Command, call: i64, errno: i32) {
    deny_if(command, call, None, errno);
}

/// The same if its second argument is this one, where one is given.
pub fn deny_if(command: &mut Command, call: i64, second: Option<i32>, errno: i32) {
    // In struct seccomp_data: the number of the call, and the lower half of the second argument.
    const CALL: u32 = 0;
    const SECOND: u32 = 24;
    let (at, value) = second.map_or((CALL, call as u32), |second| (SECOND, second as u32));
    let set = move || {
        const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut filter = [
            step(LOAD, 0, 0, CALL),
            step(IS, 0, 3, call as u32),
            step(LOAD, 0, 0, at),
            step(IS, 0, 1, value),
            step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
            step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the program and its filter live until the call returns; the kernel copies them.
        let result =
            unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: after the fork it only makes one system call, and allocates nothing.
    unsafe { command.pre_exec(set) };
}
