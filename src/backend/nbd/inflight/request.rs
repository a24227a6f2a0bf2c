//! The caller's end of a request.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use smol::lock::SemaphoreGuard;

use super::{Ask, Cookie, Extent, Failure};
use crate::backend::nbd::connection::Connection;

/// A request in flight: yields the answer. May be dropped; see [`super`].
pub struct Request<'a> {
    connection: &'a Connection,
    /// Empty once the answer was taken.
    cookie: Option<Cookie>,
    lent: PhantomData<&'a mut [u8]>,
}

impl<'a> Request<'a> {
    /// Puts `ask` in flight and into the send queue. `permit` stands for the slot that it takes,
    /// and goes back when the slot becomes free.
    ///
    /// # Safety
    /// The request is not leaked while `'a` ends.
    pub unsafe fn begin(
        connection: &'a Connection,
        permit: SemaphoreGuard<'_>,
        ask: Ask<'a>,
    ) -> Result<Request<'a>, Failure> {
        let Ask { command, flags, offset, length, .. } = ask;
        let cookie = connection.with(|state| {
            // It is lost under the same lock.
            if connection.is_lost() {
                return Err(Failure::Lost);
            }
            // SAFETY: `'a` borrows the buffer for as long as the `Request` lives, which is not
            // leaked, and its `Drop` lets go.
            let cookie = unsafe { state.table.insert(ask) };
            permit.forget();
            state.enqueue(command, flags, cookie, offset, length);
            Ok(cookie)
        })?;
        Ok(Request { connection, cookie: Some(cookie), lent: PhantomData })
    }
}

impl Future for Request<'_> {
    type Output = Result<Vec<Extent>, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let cookie = self.cookie.expect("polled after completion");
        let answer = self.connection.with(|state| {
            let answer = state.table.answer(cookie, cx);
            if answer.is_ready() {
                state.table.let_go(cookie);
            }
            answer
        });
        if answer.is_ready() {
            self.cookie = None;
        }
        answer
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if let Some(cookie) = self.cookie {
            self.connection.with(|state| state.table.let_go(cookie));
        }
    }
}
