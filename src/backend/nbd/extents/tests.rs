use super::*;

const SIZE: u64 = 1 << 50;
const ALL: Range<u64> = 0..SIZE;

fn told(lengths: &[u64], first_is_zero: bool) -> Vec<Extent> {
    let kinds = [first_is_zero, !first_is_zero].into_iter().cycle();
    lengths.iter().zip(kinds).map(|(&length, zero)| Extent { length, zero }).collect()
}

fn learn(extents: &Extents, start: u64, lengths: &[u64], first_is_zero: bool) {
    extents.ask(SIZE).answered(&(start..SIZE), &told(lengths, first_is_zero), SIZE);
}

#[test]
fn reads_leave_known_holes_out_and_ask_when_they_go_on() {
    let extents = Extents::default();
    let look = |range| extents.look(range);
    assert_eq!(look(0..100), Look { read: 0..100, ask_from: None });
    assert_eq!(look(500..600), Look { read: 500..600, ask_from: None }, "not in order");
    assert_eq!(look(100..200), Look { read: 100..200, ask_from: Some(100) });
    // A hole, data, a hole, and what is not known.
    learn(&extents, 0, &[150, 100, 250], true);
    assert_eq!(look(0..150), Look { read: 150..150, ask_from: None });
    assert_eq!(look(100..300), Look { read: 150..250, ask_from: None });
    assert_eq!(look(200..600), Look { read: 200..600, ask_from: None });
    assert_eq!(look(300..400), Look { read: 400..400, ask_from: None });
    assert_eq!(look(400..600), Look { read: 500..600, ask_from: Some(500) });
    drop(extents.changing(300..301));
    assert_eq!(look(260..400), Look { read: 300..301, ask_from: None });
    let mut stats = RemoteStats::default();
    extents.add_stats(&mut stats);
    assert_eq!((stats.hole_hits, stats.hole_hit_bytes), (5, 150 + 3 * 100 + 139));
    assert_eq!(stats.hole_requests, 1);
}

/// What is known, and that neighbours differ.
fn known(extents: &Extents) -> Vec<(u64, u64, bool)> {
    let state = extents.lock();
    let known: Vec<_> =
        state.known.iter().map(|(&at, piece)| (at, piece.end, piece.zero)).collect();
    for pair in known.windows(2) {
        let ((_, end, zero), (next, _, next_zero)) = (pair[0], pair[1]);
        assert!(end < next || end == next && zero != next_zero, "{known:?}");
    }
    drop(state);
    let watched = extents.watched.load(Ordering::SeqCst);
    assert_eq!(watched, !known.is_empty() || !extents.lock().asks.is_empty());
    known
}

#[test]
fn what_was_told_is_found_and_gaps_are_not_passed() {
    let extents = Extents::default();
    assert_eq!(extents.find(5, Seek::Data), Found::NotBefore(5));
    learn(&extents, 100, &[100, 50, 50], true);
    assert_eq!(extents.find(99, Seek::Hole), Found::NotBefore(99));
    assert_eq!(extents.find(100, Seek::Hole), Found::At(100));
    assert_eq!(extents.find(150, Seek::Hole), Found::At(150));
    assert_eq!(extents.find(150, Seek::Data), Found::At(200));
    assert_eq!(extents.find(200, Seek::Data), Found::At(200));
    assert_eq!(extents.find(249, Seek::Hole), Found::At(250));
    assert_eq!(extents.find(260, Seek::Data), Found::NotBefore(300));
    assert_eq!(extents.find(300, Seek::Data), Found::NotBefore(300));
    learn(&extents, 310, &[10], false);
    assert_eq!(extents.find(260, Seek::Data), Found::NotBefore(300));
}

#[test]
fn neighbours_of_one_kind_are_merged_and_the_last_answer_counts() {
    let extents = Extents::default();
    learn(&extents, 0, &[100], true);
    learn(&extents, 200, &[100], true);
    learn(&extents, 100, &[100], true);
    assert_eq!(known(&extents), [(0, 300, true)]);
    learn(&extents, 150, &[50, 150, 50], false);
    assert_eq!(
        known(&extents),
        [(0, 150, true), (150, 200, false), (200, 350, true), (350, 400, false)]
    );
    learn(&extents, 100, &[250], false);
    assert_eq!(known(&extents), [(0, 100, true), (100, 400, false)]);
}

#[test]
fn nothing_is_known_behind_the_end() {
    let extents = Extents::default();
    let told = told(&[50, 100, u64::MAX, u64::MAX], true);
    extents.ask(100).answered(&(0..100), &told, 100);
    assert_eq!(known(&extents), [(0, 50, true), (50, 100, false)]);
    assert_eq!(extents.find(60, Seek::Hole), Found::NotBefore(100));
}

#[test]
fn writes_forget_what_they_touch() {
    for (written, rest) in [
        (140..160, vec![(100, 140, true), (160, 200, true), (200, 300, false)]),
        (100..200, vec![(200, 300, false)]),
        (50..150, vec![(150, 200, true), (200, 300, false)]),
        (150..250, vec![(100, 150, true), (250, 300, false)]),
        (250..900, vec![(100, 200, true), (200, 250, false)]),
        (0..900, vec![]),
        (0..100, vec![(100, 200, true), (200, 300, false)]),
        (300..400, vec![(100, 200, true), (200, 300, false)]),
        (150..150, vec![(100, 200, true), (200, 300, false)]),
    ] {
        let extents = Extents::default();
        learn(&extents, 100, &[100, 100], true);
        drop(extents.changing(written.clone()));
        assert_eq!(known(&extents), rest, "{written:?}");
    }
}

#[test]
fn pieces_agree_with_a_model() {
    let mut seed = 1_u64;
    let mut below = move |bound: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % bound
    };
    let mut state = State::default();
    let mut model = [None; 100];
    for _ in 0..20_000 {
        let (start, zero) = (below(100), below(2) == 0);
        let range = start..start + below(101 - start);
        let bytes = &mut model[range.start as usize..range.end as usize];
        if below(4) == 0 {
            state.cut(&range);
            bytes.fill(None);
        } else {
            state.insert(range, zero);
            bytes.fill(Some(zero));
        }
        let from = below(100);
        for what in [Seek::Data, Seek::Hole] {
            let rest = (from..).zip(&model[from as usize..]);
            let expected = rest
                .filter_map(|(at, byte)| match byte {
                    None => Some(Found::NotBefore(at)),
                    Some(zero) => (*zero == (what == Seek::Hole)).then_some(Found::At(at)),
                })
                .next();
            assert_eq!(state.find(from, what), expected.unwrap_or(Found::NotBefore(100)));
        }
    }
}

#[test]
fn an_answer_is_not_remembered_where_was_written_since_it_was_asked_for() {
    let extents = Extents::default();
    // Within the ask, and begun before it.
    let before = extents.changing(500..600);
    let ask = extents.ask(SIZE);
    drop(extents.changing(100..200));
    drop(before);
    ask.answered(&ALL, &told(&[1000], true), SIZE);
    assert_eq!(known(&extents), [(0, 100, true), (200, 500, true), (600, 1000, true)]);
    // Begun within the ask, and not yet ended.
    let ask = extents.ask(SIZE);
    let within = extents.changing(0..10);
    ask.answered(&ALL, &told(&[1000], true), SIZE);
    drop(within);
    // Around the ask.
    let around = extents.changing(20..30);
    learn(&extents, 15, &[20], true);
    drop(around);
    assert_eq!(known(&extents), [(10, 20, true), (30, 1000, true)]);
    // Of two asks the later one began after the write.
    let early = extents.ask(SIZE);
    drop(extents.changing(0..1000));
    let late = extents.ask(SIZE);
    early.answered(&ALL, &told(&[1000], true), SIZE);
    assert_eq!(known(&extents), []);
    late.answered(&ALL, &told(&[1000], false), SIZE);
    assert_eq!(known(&extents), [(0, 1000, false)]);
}

#[test]
fn more_writes_than_are_kept_apart_are_not_lost() {
    let extents = Extents::default();
    let ask = extents.ask(SIZE);
    for n in 0..MAX_WRITTEN as u64 {
        drop(extents.changing(n * 10..n * 10 + 1));
    }
    assert!(extents.lock().asks.iter().all(|(_, written)| written.len() == MAX_WRITTEN));
    ask.answered(&ALL, &told(&[SIZE], true), SIZE);
    for n in 0..MAX_WRITTEN as u64 {
        assert_eq!(extents.find(n * 10, Seek::Hole), Found::NotBefore(n * 10));
    }
    assert_eq!(extents.find(5, Seek::Hole), Found::At(5));
}

#[test]
fn answers_are_believed_for_a_second_after_they_were_asked_for() {
    let extents = Extents::default();
    learn(&extents, 0, &[100], true);
    let mut ask = extents.ask(SIZE);
    ask.begun -= LIFE * 9 / 10;
    let begun = ask.begun;
    ask.answered(&(200..300), &told(&[100], true), SIZE);
    assert_eq!(extents.lock().oldest, Some(begun));
    assert_eq!(known(&extents).len(), 2);
    extents.lock().oldest = Some(begun - LIFE / 10);
    assert_eq!(extents.find(250, Seek::Hole), Found::NotBefore(250));
    assert_eq!(known(&extents), []);
    // One that took too long to come takes nothing away either.
    learn(&extents, 0, &[100], true);
    let mut ask = extents.ask(SIZE);
    ask.begun -= LIFE;
    ask.answered(&(200..300), &told(&[100], true), SIZE);
    assert_eq!(known(&extents), [(0, 100, true)]);
}

#[test]
fn a_write_after_a_while_finds_nothing_to_do() {
    let extents = Extents::default();
    learn(&extents, 0, &[100], true);
    extents.lock().oldest = Some(Instant::now() - LIFE);
    drop(extents.changing(5000..5001));
    assert!(!extents.watched.load(Ordering::SeqCst));
}

#[test]
fn memory_is_bounded() {
    let extents = Extents::default();
    let lengths = vec![1; 1000];
    for n in 0..200 {
        learn(&extents, n * 1000, &lengths, true);
        assert!(extents.lock().known.len() <= MAX_REMEMBERED);
    }
    assert!(extents.lock().known.len() > 1000);
    // A write in the middle of an extent makes two of it.
    extents.forget_all();
    learn(&extents, 0, &[SIZE], true);
    // However long this takes, it is not forgotten meanwhile.
    extents.lock().oldest = Some(Instant::now() + Duration::from_secs(3600));
    let mut most = 0;
    for n in 0..MAX_REMEMBERED as u64 + 10 {
        drop(extents.changing(n * 10..n * 10 + 1));
        most = most.max(extents.lock().known.len());
    }
    assert_eq!(most, MAX_REMEMBERED);
}

#[test]
fn everything_is_forgotten_also_what_is_asked_for() {
    let extents = Extents::default();
    learn(&extents, 0, &[100], true);
    let ask = extents.ask(SIZE);
    extents.forget_all();
    ask.answered(&ALL, &told(&[100], true), SIZE);
    assert_eq!(known(&extents), []);
    drop(extents.ask(SIZE));
    assert_eq!(known(&extents), []);
    assert_eq!(extents.asked(), 3);
}

#[test]
fn the_reach_follows_the_answers() {
    let (extents, longest) = (Extents::default(), u64::from(u32::MAX));
    let answer = |length: u64, lengths: &[u64]| {
        let ask = extents.ask(longest);
        let start = ask.reach().min(length);
        ask.answered(&(0..start), &told(lengths, true), SIZE);
        extents.ask(longest).reach()
    };
    let full = vec![4096; MAX_EXTENTS];
    assert_eq!(extents.ask(longest).reach(), FIRST_REACH);
    assert_eq!(extents.ask(1 << 20).reach(), 1 << 20);
    assert_eq!(answer(SIZE, &[SIZE]), 2 * FIRST_REACH);
    for _ in 0..10 {
        answer(SIZE, &[SIZE]);
    }
    assert_eq!(answer(SIZE, &[SIZE]), longest);
    // Little was asked for at the end of the disk: that tells nothing.
    assert_eq!(answer(4096, &[4096]), longest);
    assert_eq!(answer(SIZE, &vec![1 << 20; MAX_EXTENTS / 2]), longest);
    // At once to what was kept, and never to nothing.
    assert_eq!(answer(SIZE, &full), 4 << 20);
    assert_eq!(answer(SIZE, &full), 2 << 20);
    assert_eq!(answer(SIZE, &vec![512; MAX_EXTENTS]), MIN_REACH);
    assert_eq!(answer(SIZE, &vec![512; MAX_EXTENTS]), MIN_REACH);
    assert_eq!(answer(SIZE, &[SIZE]), 2 * MIN_REACH);
}
