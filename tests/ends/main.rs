//! Every way to end, under load: nothing is left, and nothing acknowledged is lost.

#[path = "../common/mod.rs"]
mod common;
mod load;

use std::process::ExitCode;

use common::image::Kind;

fn main() -> ExitCode {
    common::suite::run(promises![
        load::sigterm_keeps_every_acknowledged_write if |k| k.visible && is_one_of_its_sort(k),
        load::unmount_keeps_every_acknowledged_write if |k| k.visible && is_one_of_its_sort(k),
        load::second_signal_ends_it_at_once if is_one_of_its_sort,
        load::killed_program_is_cleared_away_by_the_next if is_one_of_its_sort,
        load::rounds_of_load_cut_off_leave_nothing ["fio", "root"] if has_rounds,
        load::requests_in_flight_cost_little_memory ["fio"] if is_one_of_its_sort,
    ])
}

/// The end is the same for the others. (nbdkit 1.32 fails an assertion of its own when its client is killed.)
fn is_one_of_its_sort(kind: &Kind) -> bool {
    ["file", "file-direct", "mem", "loop", "qemu-nbd-unix", "qemu-nbd-tcp"].contains(&kind.name)
}

/// Rounds take long: `scripts/terminate` runs more of them.
fn has_rounds(kind: &Kind) -> bool {
    ["file", "file-direct", "qemu-nbd-unix"].contains(&kind.name)
}
