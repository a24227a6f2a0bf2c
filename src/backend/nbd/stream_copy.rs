//! Copies of what will hardly ever be read again.

#![allow(unsafe_code)]

/// From so many bytes on it is worth it.
#[cfg(target_arch = "x86_64")]
const LONG: usize = 16 << 10;

/// As `to.copy_from_slice(from)`. A long copy goes past the caches, and leaves in them what is
/// there: the source itself, which a server on this machine may be about to read.
pub fn copy_past_the_caches(to: &mut [u8], from: &[u8]) {
    assert_eq!(to.len(), from.len());
    #[cfg(target_arch = "x86_64")]
    if to.len() >= LONG {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_sfence, _mm_stream_si128};

        // SAFETY: every sequence of bytes is a `__m128i`, and of its type.
        let (head, middle, tail) = unsafe { to.align_to_mut::<std::arch::x86_64::__m128i>() };
        let (before, rest) = from.split_at(head.len());
        let (at, behind) = rest.split_at(size_of_val(middle));
        head.copy_from_slice(before);
        for (to, from) in middle.iter_mut().zip(at.chunks_exact(16)) {
            // SAFETY: 16 bytes are read, from any address, and written to an aligned one. SSE2 is a
            // part of x86-64.
            unsafe { _mm_stream_si128(to, _mm_loadu_si128(from.as_ptr().cast())) };
        }
        // SAFETY: no arguments. Whoever reads the bytes, on whatever CPU, is to find them.
        unsafe { _mm_sfence() };
        return tail.copy_from_slice(behind);
    }
    to.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_copies_whatever_the_place() {
        let from: Vec<u8> = (0..40_000_u32).map(|n| (n * 7 + (n >> 8)) as u8).collect();
        for start in 0..40 {
            for length in [0, 1, 100, 16_384, 16_400, 20_001] {
                let mut to = vec![0; 40_000];
                copy_past_the_caches(&mut to[start..start + length], &from[start / 2..][..length]);
                assert!(to[start..start + length] == from[start / 2..][..length]);
                assert!(to[..start].iter().chain(&to[start + length..]).all(|byte| *byte == 0));
            }
        }
    }
}
