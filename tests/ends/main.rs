//! Every way to end, under load: nothing is left, and nothing acknowledged is lost.

#[path = "../common/mod.rs"]
mod common;
mod load;

use std::process::ExitCode;

use common::image::Kind;

fn main() -> ExitCode {
    common::suite::run(promises![
        load::sigterm_keeps_every_acknowledged_write if |k| k.visible,
        load::unmount_keeps_every_acknowledged_write if |k| k.visible,
        load::second_signal_ends_it_at_once,
        load::killed_program_is_cleared_away_by_the_next,
        load::rounds_of_load_cut_off_leave_nothing ["fio", "root"] if has_rounds,
        load::requests_in_flight_cost_little_memory ["fio"],
    ])
}

/// Rounds take long: `scripts/terminate` runs more of them.
fn has_rounds(kind: &Kind) -> bool {
    ["file", "file-direct"].contains(&kind.name)
}
