//! Every way to end, under load: nothing is left, and nothing acknowledged is lost.

#[path = "../common/mod.rs"]
mod common;
mod load;
mod places;

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
        places::next_disk_in_the_same_place_is_not_taken_for_the_first ["root"] if is_a_file,
        places::next_disk_may_have_the_same_pidfile ["root"] if is_a_file,
        places::folder_that_was_moved_is_found ["root"] if is_a_file,
        places::copy_in_another_namespace_keeps_nothing_alive ["root", "unshare"] if is_a_file,
        places::what_is_mounted_on_top_goes_first ["root"] if is_a_file,
        places::owner_takes_his_file_away if is_a_file,
        places::first_read_that_never_comes_ends_with_a_signal ["nbdkit"] if is_a_file,
        places::device_that_is_in_use_is_not_exported_writable ["loop", "mkfs.ext4"] if |k| k.name == "loop",
    ])
}

/// The place is the same for all kinds of source.
fn is_a_file(kind: &Kind) -> bool {
    kind.name == "file"
}

/// The end is the same for the others. (nbdkit 1.32 fails an assertion of its own when its client
/// is killed.)
fn is_one_of_its_sort(kind: &Kind) -> bool {
    ["file", "file-direct", "mem", "loop", "qemu-nbd-unix", "qemu-nbd-tcp"].contains(&kind.name)
}

/// Rounds take long: `scripts/terminate` runs more of them.
fn has_rounds(kind: &Kind) -> bool {
    ["file", "file-direct", "qemu-nbd-unix"].contains(&kind.name)
}
