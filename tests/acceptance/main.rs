//! What the exported file must do, over transport × kind of source. The numbers are those of the
//! project's list of acceptance, which follows QEMU's own tests of its FUSE export.

#[path = "../common/mod.rs"]
mod common;

mod cache;
mod clients;
mod errors;
mod holes;
mod io;
mod modes;
mod mounting;
mod parts;
mod report;
mod size;

use std::process::ExitCode;

use common::image::Kind;

/// The kinds for what hardly depends on them: each way to the bytes once.
const TYPICAL: [&str; 8] = [
    "file",
    "file-direct",
    "tmpfs-writeback",
    "loop",
    "loop-direct",
    "nbdkit-4k",
    "nbdkit-writeback",
    "qemu-nbd-tcp",
];

fn main() -> ExitCode {
    common::suite::run(promises![
        // 1-4
        mounting::missing_mountpoint_is_created_and_removed,
        mounting::mountpoint_gets_its_own_content_back,
        mounting::served_mountpoint_says_already,
        mounting::export_equals_the_image ["qemu-img"] if |k| k.visible,
        mounting::odd_size_ends_in_a_short_read if |k| k.resizable,
        mounting::image_is_mounted_over_itself if |k| k.regular,
        mounting::second_writable_export_is_refused if |k| k.locked,
        mounting::image_without_locks_is_served_with_a_warning ["root"] if |k| k.locked,
        mounting::every_signal_ends_it_cleanly,
        mounting::unmount_from_outside_ends_it_cleanly,
        mounting::file_that_is_in_use_is_reported_and_taken_away,
        mounting::awkward_paths_are_served if |k| k.regular,
        // 5-7
        modes::read_only_stays_read_only,
        modes::image_that_cannot_be_written_is_read_only if |k| k.regular,
        modes::device_that_cannot_be_written_is_read_only ["blockdev"] if |k| k.name.starts_with("loop"),
        modes::chmod_and_chown_within_what_makes_sense,
        modes::other_user_is_shut_out_unless_allowed ["root"],
        modes::owner_can_be_chosen ["root"],
        modes::times_can_be_set if |k| !k.writeback,
        modes::modification_time_is_that_of_the_write ["zero-range"] if |k| !k.writeback,
        modes::reads_leave_the_images_access_time if |k| k.regular,
        // 8-10
        size::fixed_disk_ends_where_it_ends if |k| !k.writeback,
        size::growable_disk_grows if |k| k.resizable,
        size::truncate_keeps_both_lengths_equal if |k| k.resizable,
        size::size_that_others_have_changed_is_known if |k| k.regular && !k.writeback,
        size::device_that_grows_is_seen_to_grow if |k| k.name.starts_with("loop"),
        size::appends_beside_stat_are_read_back if |k| k.resizable,
        size::fallocate_past_the_end_grows ["zero-range"] if |k| k.resizable,
        size::disk_of_fixed_size_keeps_it ["zero-range"] if |k| !k.writeback,
        size::o_trunc_never_lets_old_bytes_through if |k| !k.writeback,
        size::refused_o_trunc_disturbs_nobody ["python3", "mmap"],
        size::growable_disk_is_emptied_by_o_trunc if |k| k.resizable,
        // 11-13
        holes::punch_hole_zeroes_and_frees if |k| k.punches,
        holes::punch_hole_is_refused_where_it_cannot_be ["zero-range"] if |k| !k.punches,
        holes::zero_range_zeroes ["zero-range"],
        holes::zeroes_in_memory_need_none ["zero-range"] if |k| k.name == "mem" || k.name == "tmpfs",
        holes::other_fallocate_modes_are_refused ["zero-range"],
        holes::seek_shows_the_images_holes if |k| !k.writeback,
        holes::copies_keep_the_holes if |k| k.counts_blocks && k.visible,
        holes::stat_and_statfs_are_sensible,
        // 14-16, 18
        io::many_reads_at_depth_64_complete ["fio"],
        io::shared_mapping_reaches_the_image ["python3", "mmap"],
        io::clients_of_all_kinds_read_what_they_wrote ["fio"],
        io::clients_that_map_read_what_they_wrote ["fio", "mmap"],
        io::large_requests_beside_small_ones_arrive_whole ["fio"],
        io::threads_outlive_a_mixed_load ["fio"] if |k| k.name == "tmpfs",
        io::unaligned_io_matches_a_model,
        io::parallel_writers_do_not_mix,
        io::durable_writes_reach_the_image,
        // The page cache
        cache::direct_and_cached_clients_see_each_others_writes,
        cache::first_open_sees_what_others_wrote if |k| k.visible && !k.keeps_cache(),
        cache::open_file_sees_what_others_wrote if |k| k.visible && !k.is_cached() && !k.name.starts_with("loop"),
        cache::kept_cache_asks_for_nothing_twice if |k| k.keeps_cache(),
        cache::written_pages_reach_the_source_in_time ["python3"] if |k| k.writeback && k.visible,
        cache::pages_that_are_lost_are_told_of ["root", "python3"] if |k| k.writeback,
        cache::writes_past_the_end_come_to_an_end if |k| k.writeback,
        cache::holes_are_data_while_somebody_writes if |k| k.writeback && k.shows_holes,
        clients::loop_device_carries_a_file_system ["loop", "mkfs.ext4", "e2fsck"],
        clients::qemu_img_agrees ["qemu-img"] if |k| k.visible,
        // Parts of a disk
        parts::gpt_partitions_keep_to_themselves ["loop", "mkfs.ext4", "e2fsck", "sfdisk"]
            if |k| ["file", "loop-direct", "nbdkit-4k", "nbdkit-writeback"].contains(&k.name),
        parts::mbr_partitions_keep_to_themselves ["loop", "mkfs.ext4", "e2fsck", "sfdisk"]
            if |k| ["file", "loop-direct", "nbdkit-4k", "nbdkit-writeback"].contains(&k.name),
        parts::range_keeps_to_itself ["zero-range"] if |k| TYPICAL.contains(&k.name),
        parts::truncation_zeroes_no_neighbour
            if |k| TYPICAL.contains(&k.name) && k.visible && !k.writeback,
        parts::part_that_is_not_there_is_refused ["sfdisk"] if |k| TYPICAL.contains(&k.name),
        parts::info_shows_the_partitions ["sfdisk"]
            if |k| TYPICAL.contains(&k.name) || k.name == "nbd-crate",
        report::report_counts_what_was_asked if |k| TYPICAL.contains(&k.name) || k.writeback,
        report::attributes_are_told_and_cannot_be_changed if |k| TYPICAL.contains(&k.name),
        report::writes_do_not_ask_for_attributes if |k| TYPICAL.contains(&k.name) || k.writeback,
        // 17-19
        errors::error_fails_only_the_requests_that_touch_it ["blockdev"] if |k| k.name.starts_with("loop"),
        errors::device_with_a_bad_end_is_served_read_only ["blockdev"] if |k| k.name.starts_with("loop"),
        errors::flush_reaches_the_disk_and_its_failure_the_exit_status ["loop"] if |k| k.name == "loop",
        errors::write_that_is_lost_beside_others_is_told_by_fsync ["loop"] if |k| k.name == "loop-direct",
        errors::full_file_system_says_so ["root"] if |k| k.name == "tmpfs",
        errors::servers_error_fails_only_the_requests_that_touch_it if |k| k.name == "nbdkit-unix",
        errors::servers_failed_flush_reaches_fsync_and_the_exit_status if |k| k.name == "nbdkit-unix",
        clients::fsx_finds_no_mismatch ["fsx"] if |k| !k.name.ends_with("-tcp"),
    ])
}
