use super::*;

/// A READ whose buffer the test keeps until the end of the table.
pub fn begin_read(table: &mut Table, offset: u64, buf: &mut [u8]) -> Cookie {
    read(table, offset, buf)
}

/// A BLOCK_STATUS.
pub fn begin_status(table: &mut Table) -> Cookie {
    let (command, payload) = (Command::BlockStatus, Payload::None);
    // SAFETY: there is no buffer.
    unsafe { table.insert(Ask { command, flags: 0, offset: 0, length: 1 << 20, payload }) }
}

fn read(table: &mut Table, offset: u64, buf: &mut [u8]) -> Cookie {
    let length = buf.len() as u64;
    let payload = Payload::Fill(buf);
    let ask = Ask { command: Command::Read, flags: 0, offset, length, payload };
    // SAFETY: the tests keep their buffers until the end.
    unsafe { table.insert(ask) }
}

fn answer(table: &mut Table, cookie: Cookie) -> Option<Result<Vec<Extent>, i32>> {
    match table.answer(cookie, &mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => Some(answer.map_err(|e| io::Error::from(e).raw_os_error().unwrap())),
        Poll::Pending => None,
    }
}

#[test]
fn chunks_in_any_order_fill_the_buffer_and_holes_are_zeroed() {
    let mut table = Table::new(Default::default());
    let mut buf = [7; 10];
    let cookie = read(&mut table, 100, &mut buf);
    table.sent(cookie);
    assert_eq!(table.begin_data(cookie, 106, 4).unwrap(), Some(6));
    table.destination(cookie, 6, 4).unwrap().copy_from_slice(b"abcd");
    table.hole(cookie, 100, 6).unwrap();
    table.complete(cookie, &mut Vec::new()).unwrap();
    assert_eq!(answer(&mut table, cookie), Some(Ok(vec![])));
    table.let_go(cookie);
    assert_eq!(&buf, b"\0\0\0\0\0\0abcd");
    assert_eq!(table.take_freed(), 1);
}

#[test]
fn missing_twofold_and_stray_bytes_fail_the_read_only() {
    for chunks in [&[(100, 9)][..], &[(100, 6), (105, 5)], &[(99, 10)], &[(101, 10)], &[]] {
        let mut table = Table::new(Default::default());
        let mut buf = [7; 10];
        let cookie = read(&mut table, 100, &mut buf);
        for &(offset, length) in chunks {
            table.begin_data(cookie, offset, length).unwrap();
        }
        table.complete(cookie, &mut Vec::new()).unwrap();
        assert_eq!(answer(&mut table, cookie), Some(Err(libc::EIO)), "{chunks:?}");
    }
}

#[test]
fn more_bytes_than_were_asked_for_are_a_violation() {
    let mut table = Table::new(Default::default());
    let mut buf = [7; 10];
    let cookie = read(&mut table, 100, &mut buf);
    for (offset, length) in [(100, 11), (99, 11), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        assert!(table.begin_data(cookie, offset, length).is_err(), "{length} at {offset}");
        assert!(table.hole(cookie, offset, length).is_err(), "{length} at {offset}");
    }
    assert_eq!(table.begin_data(cookie, 100, 10).unwrap(), Some(0));
    assert_eq!(buf, [7; 10]);
}

#[test]
fn the_first_error_counts() {
    let mut table = Table::new(Default::default());
    let mut buf = [0; 4];
    let cookie = read(&mut table, 0, &mut buf);
    table.begin_data(cookie, 0, 2).unwrap();
    table.error(cookie, 28).unwrap();
    table.error(cookie, 5).unwrap();
    table.complete(cookie, &mut Vec::new()).unwrap();
    assert_eq!(answer(&mut table, cookie), Some(Err(libc::ENOSPC)));
}

#[test]
fn an_abandoned_read_keeps_its_slot_and_not_its_buffer() {
    let mut table = Table::new(Default::default());
    let mut buf = vec![0; 20 << 10];
    let cookie = read(&mut table, 0, &mut buf);
    assert!(table.awaits_direct_read());
    table.sent(cookie);
    assert_eq!(table.begin_data(cookie, 0, 20 << 10).unwrap(), Some(0));
    table.let_go(cookie);
    drop(buf);
    assert!(table.destination(cookie, 0, 20 << 10).is_none());
    assert_eq!(table.take_freed(), 0);
    table.complete(cookie, &mut Vec::new()).unwrap();
    assert_eq!(table.take_freed(), 1);
    assert!(!table.awaits_direct_read());
    assert!(table.complete(cookie, &mut Vec::new()).is_err());
}

#[test]
fn an_abandoned_write_is_sent_from_a_copy() {
    let mut table = Table::new(Default::default());
    let data = b"data".to_vec();
    let payload = Payload::Send(&data);
    let ask = Ask { command: Command::Write, flags: 0, offset: 0, length: 4, payload };
    // SAFETY: let go before `data` is dropped.
    let cookie = unsafe { table.insert(ask) };
    table.let_go(cookie);
    drop(data);
    assert_eq!(table.data_to_send(cookie), b"data");
    table.complete(cookie, &mut Vec::new()).unwrap();
    assert_eq!(table.take_freed(), 0);
    table.sent(cookie);
    assert_eq!(table.take_freed(), 1);
}

#[test]
fn cookies_are_not_used_twice() {
    let mut table = Table::new(Default::default());
    let mut buf = [0; 4];
    let first = read(&mut table, 0, &mut buf);
    table.sent(first);
    table.error(first, 5).unwrap();
    table.complete(first, &mut Vec::new()).unwrap();
    table.let_go(first);
    let second = read(&mut table, 0, &mut buf);
    assert_eq!(first.index(), second.index());
    assert_ne!(first, second);
    assert!(table.begin_data(first, 0, 4).is_err());
    assert!(table.begin_data(Cookie(u64::MAX), 0, 4).is_err());
}

#[test]
fn a_lost_connection_fails_everything_and_keeps_what_was_answered() {
    let mut table = Table::new(Default::default());
    let (mut a, mut b) = ([0; 4], [0; 4]);
    let answered = read(&mut table, 0, &mut a);
    table.begin_data(answered, 0, 4).unwrap();
    table.complete(answered, &mut Vec::new()).unwrap();
    let waiting = read(&mut table, 0, &mut b);
    assert_eq!(answer(&mut table, waiting), None);
    let mut wakers = Vec::new();
    table.fail_all(&mut wakers);
    assert_eq!(wakers.len(), 1);
    assert_eq!(answer(&mut table, answered), Some(Ok(vec![])));
    assert_eq!(answer(&mut table, waiting), Some(Err(libc::EIO)));
    table.let_go(answered);
    table.let_go(waiting);
    assert_eq!(table.take_freed(), 2);
}
