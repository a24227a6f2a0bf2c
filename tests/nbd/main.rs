//! Remote disks through the whole program: servers that limit, fail, delay, refuse and die, TLS,
//! other hosts, and what a script does. The acceptance suite runs over NBD by itself; here is what
//! only a server can do.

#[path = "../common/mod.rs"]
mod common;

mod all;
mod calls;
mod filters;
mod hosts;
mod hung;
mod lost;
mod refusals;
mod report;
mod returns;
mod scripts;
mod servers;
mod tls;
mod vsock;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use common::ability::Ability;
use common::export::{Ended, Export, Transport};
use common::image::write_sparse;
use common::nbd::{Address, Server};
use common::sandbox::Sandbox;
use common::suite::{needs_of, run_trials, trial};
use libtest_mimic::Trial;

/// The size of most tests' disks, in bytes.
const SIZE: usize = 4 << 20;

/// What one test has: a transport, and a folder in memory.
struct Bench {
    transport: Transport,
    sandbox: Sandbox,
}

impl Bench {
    fn new(transport: Transport) -> Bench {
        Bench { transport, sandbox: in_memory() }
    }

    /// A disk's bytes in a file.
    fn disk(&self, bytes: &[u8]) -> PathBuf {
        let path = self.sandbox.join("disk.img");
        write_sparse(&path, bytes);
        path
    }

    /// nbdkit on a Unix socket; `words` are its options, a plugin and its parameters. Its disk's
    /// URI.
    fn nbdkit(&self, words: &[&str]) -> (Server, String) {
        let address = Address::unix(&self.sandbox);
        (Server::nbdkit(&address, words), address.uri(""))
    }

    /// Exports it as `disk` in the folder; it ends when dropped.
    fn export(&self, uri: &str) -> Export {
        self.try_export(uri, &[]).unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log))
    }

    fn try_export(&self, uri: &str, options: &[&str]) -> Result<Export, Ended> {
        let options = [&[self.transport.option()], options].concat();
        Export::try_start(uri, &self.sandbox.join("disk"), &options, |_| ())
            .map(|export| export.only_by(self.transport))
    }
}

/// A folder in memory: the disks of these tests are not to be slow.
fn in_memory() -> Sandbox {
    Sandbox::below(Path::new("/dev/shm"))
}

/// Reads and writes.
fn open(path: &Path, flags: i32) -> File {
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// A test over each transport.
struct Test {
    name: &'static str,
    test: fn(&Bench),
    needs: &'static [Ability],
}

macro_rules! tests {
    ($($module:ident :: $test:ident [$($need:literal),*]),* $(,)?) => {
        [$(Test {
            name: concat!(stringify!($module), "::", stringify!($test)),
            test: $module::$test,
            needs: &["fuse", "nbd" $(, $need)*],
        }),*]
    };
}

fn main() -> ExitCode {
    let tests = tests![
        all::hundred_exports_are_listed_read_and_written ["root", "nbdkit"],
        all::nothing_is_made_or_removed_in_it ["root", "nbdkit"],
        all::names_are_escaped ["nbdkit"],
        all::one_that_fails_hurts_no_other ["nbdkit"],
        all::server_that_comes_back_is_there_for_open_files ["nbdkit"],
        all::acknowledged_writes_are_flushed_at_the_end ["nbdkit"],
        all::lost_writes_are_told_at_the_end ["nbdkit"],
        all::read_only_files_cannot_be_written ["root", "nbdkit"],
        all::exports_of_nbd_server_have_their_sizes ["nbd-server"],
        filters::fsx_passes_through_blocks_of_4096 ["nbdkit", "fsx"],
        filters::errors_hit_only_the_range_they_are_in ["nbdkit"],
        filters::errors_come_and_go ["nbdkit"],
        filters::without_write_zeroes_ranges_are_written_and_holes_refused ["nbdkit", "zero-range"],
        filters::page_read_beside_a_direct_write_is_not_kept ["nbdkit"],
        filters::connections_are_opened_when_they_are_needed ["nbdkit", "fio"],
        filters::refused_connections_are_done_without ["nbdkit", "fio"],
        filters::one_connection_is_enough ["nbdkit"],
        filters::delays_of_many_requests_pass_together ["nbdkit"],
        filters::holes_of_the_server_are_seen ["nbdkit", "qemu-img"],
        filters::search_through_an_enormous_extent_ends ["nbdkit", "python3"],
        filters::preferred_size_of_a_server_is_bounded ["nbdkit"],
        tls::nbdkit_is_served ["nbdkit", "openssl"],
        tls::qemu_nbd_is_served ["qemu-nbd", "openssl"],
        refusals::read_only_server_makes_a_read_only_file ["nbdkit", "qemu-nbd"],
        refusals::server_of_a_read_only_file_hears_the_goodbye ["nbdkit"],
        lost::killed_server_fails_all_requests ["nbdkit"],
        lost::killed_server_of_a_flushed_disk_costs_nothing ["nbdkit"],
        lost::loss_with_nothing_unflushed_costs_nothing ["nbdkit", "python3"],
        lost::killed_server_over_tcp_fails_all_requests ["qemu-nbd"],
        lost::lost_server_ends_the_export_if_that_is_wished ["nbdkit"],
        lost::server_that_comes_back_in_time_does_not_end_the_export ["nbdkit"],
        returns::killed_server_comes_back_on_a_unix_socket ["nbdkit"],
        returns::killed_server_comes_back_over_tcp ["nbdkit"],
        returns::killed_server_comes_back_to_one_connection ["nbdkit"],
        returns::killed_server_comes_back_inside_tls ["nbdkit", "openssl"],
        returns::server_that_shuts_down_comes_back ["nbdkit"],
        returns::forgotten_writes_are_made_again_over_several_connections [],
        returns::forgotten_writes_are_made_again_over_one_connection [],
        returns::forgotten_writes_are_told_of_where_none_are_kept [],
        returns::connections_that_end_one_by_one_cost_nothing [],
        returns::requests_fail_after_the_limit_and_succeed_when_the_server_is_back ["nbdkit"],
        returns::server_that_is_gone_for_good_does_not_hold_up_the_end ["nbdkit"],
        returns::another_disk_is_refused ["nbdkit"],
        returns::server_that_stops_for_a_while_is_waited_for ["qemu-nbd"],
        returns::start_waits_for_the_server ["nbdkit"],
        report::report_follows_a_server_that_goes_and_comes_back ["nbdkit"],
        hung::report_is_told_beside_a_stopped_server ["root", "nbdkit"],
        hung::pidfile_that_waits_for_the_first_read_can_be_given_up ["root", "nbdkit"],
        hung::daemon_that_waits_for_the_first_read_can_be_given_up ["root", "nbdkit"],
        hung::command_that_waits_for_the_first_read_can_be_given_up ["root", "nbdkit"],
        hung::abort_ends_it_beside_a_stopped_server ["root", "nbdkit"],
        hung::forced_unmount_ends_it_beside_a_stopped_server ["root", "nbdkit"],
        hung::clients_of_a_stopped_server_can_be_killed ["root", "nbdkit", "python3"],
        hung::caught_signals_do_not_fail_a_read ["root", "nbdkit", "python3"],
        hung::source_that_hangs_holds_up_nobody_else ["root", "nbdkit", "python3", "taskset"],
        hung::silent_server_can_be_given_up [],
        hung::dribbling_server_can_be_given_up [],
        hung::dribbling_server_has_no_longer_than_others [],
        hung::last_flush_can_be_given_up ["nbdkit"],
        hung::failed_start_flushes_what_others_wrote ["root", "nbdkit"],
        hung::failures_are_counted_and_not_repeated ["nbdkit"],
        hung::nobody_waits_for_who_reads_the_log ["nbdkit"],
        hosts::three_hosts_in_a_row ["netns", "ip", "nsenter", "qemu-nbd", "nbdkit", "fio"],
        scripts::daemon_serves_until_it_is_told_to_end ["nbdkit"],
        scripts::daemon_that_cannot_start_says_so ["nbdkit"],
        scripts::daemon_finds_a_socket_by_a_relative_path_again ["nbdkit"],
        scripts::pidfile_in_use_is_refused ["nbdkit"],
        scripts::command_has_the_file_and_gives_the_status ["nbdkit"],
        scripts::signals_are_passed_to_the_command ["nbdkit"],
        servers::images_show_their_content ["qemu-nbd", "qemu-img"],
        servers::read_only_image_is_served_read_only ["qemu-nbd", "qemu-img", "nbdkit"],
        servers::partition_of_an_image_is_shown ["qemu-nbd", "qemu-img", "sfdisk"],
        servers::image_on_a_web_server_is_shown ["nbdkit", "nbdkit-curl", "python3"],
        servers::compressed_image_is_shown ["nbdkit", "xz"],
        servers::server_with_keys_is_reached_by_nbdkit ["nbdkit"],
        servers::server_that_cannot_start_says_why ["qemu-nbd", "nbdkit"],
        servers::server_that_dies_fails_all_requests ["nbdkit"],
        servers::server_that_dies_ends_the_export_if_that_is_wished ["nbdkit"],
        servers::server_ends_with_the_export ["root", "nbdkit"],
        servers::server_ends_when_the_program_is_killed ["root", "qemu-nbd", "python3"],
        servers::start_of_a_silent_server_can_be_given_up [],
        servers::server_that_does_not_end_is_killed ["nbdkit"],
        servers::server_has_the_socket_where_it_looks_for_it ["nbdkit"],
        servers::daemon_has_a_server ["root", "qemu-nbd", "qemu-img"],
        servers::daemon_gives_its_server_named_descriptors_only ["root", "nbdkit"],
        calls::one_read_is_one_send_and_one_receive ["nbdkit", "strace"],
        calls::its_threads_preempt_no_client ["nbdkit"],
        calls::many_reads_share_their_sends ["nbdkit", "strace", "fio"],
    ];
    let mut trials: Vec<Trial> = Vec::new();
    for transport in Transport::ALL {
        trials.extend(tests.iter().map(|test| {
            let run = test.test;
            let name = format!("{}/{}", transport.name(), test.name);
            let alone = test.name.starts_with("hung::");
            trial(name, needs_of(transport, test.needs), move || {
                // They stop servers, and a process that is started beside them may come to wait for
                // one.
                static ALONE: Mutex<()> = Mutex::new(());
                let _alone = alone.then(|| ALONE.lock().unwrap_or_else(|e| e.into_inner()));
                run(&Bench::new(transport));
            })
        }));
    }
    let examples = servers::man_page_has_these_examples;
    trials.push(trial("servers::man_page_has_these_examples".into(), vec![], examples));
    trials.extend(all::trials());
    trials.extend(refusals::trials());
    trials.extend(tls::trials());
    trials.extend(vsock::trials());
    run_trials(trials)
}
