use super::args::{SWITCHES, WITH_VALUE};
use super::mount_options::{MOUNT_WORDS, split_options};
use super::values::parse_size;
use super::*;
use std::time::Duration;

fn words(line: &str) -> Result<Command, UsageError> {
    parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
}

fn config(line: &str) -> Config {
    match words(line) {
        Ok(Command::Serve(config)) => config,
        other => panic!("{line}: {other:?}"),
    }
}

fn error(line: &str) -> String {
    words(line).expect_err(line).to_string()
}

#[test]
fn defaults() {
    let config = config("disk.img ./disk");
    assert_eq!(config.source, Source::Path("disk.img".into()));
    assert_eq!(config.words, "disk.img");
    assert_eq!(config.mountpoint, Some(PathBuf::from("./disk")));
    assert!(!config.read_only && !config.growable && !config.direct);
    assert_eq!((config.io_uring, config.allow_other), (Switch::Auto, Switch::Off));
}

#[test]
fn options_before_between_and_after_the_operands() {
    let a = config("-r --growable --io-uring off a b");
    assert_eq!(a, config("a --io-uring=off b --growable -r"));
    assert_eq!(a, config("a b -o ro,growable -o io-uring=off"));
}

#[test]
fn mount_helpers_words_are_accepted() {
    let words = config("a b -o rw,dev,suid,x-systemd.device-timeout=5,allow_other,uid=7,gid=8");
    assert_eq!((words.uid, words.gid, words.allow_other), (Some(7), Some(8), Switch::On));
    let plain = config("a b");
    let notes = ["user=joe", "comment=a=b", "comment=", "x-gvfs-show", "X-mount.mkdir=0700"];
    for word in MOUNT_WORDS.into_iter().chain(notes) {
        assert_eq!(config(&format!("a b -o {word}")), plain, "{word}");
    }
    // They ask for what would not happen.
    for word in ["bind", "sync", "context=x", "dev=1"] {
        assert!(error(&format!("a b -o {word}")).contains("-o "), "{word}");
    }
}

#[test]
fn a_backslash_quotes_in_mount_options() {
    let split = |list: &str| split_options(list).unwrap();
    assert_eq!(split("ro,,a=b"), ["ro", "", "a=b"]);
    assert_eq!(split(r"pidfile=/a\,b\\,ro"), [r"pidfile=/a,b\", "ro"]);
    assert_eq!(split(r"\054\040\,\8\"), [r", ,8\"]);
    assert_eq!(split(r"a=\303\274,b=ü\ü"), ["a=ü", "b=üü"]);
    assert!(split_options(r"a=\377").unwrap_err().to_string().contains("not UTF-8"));
    let words = config(r"a b -o pidfile=/run/a\,b,ro");
    assert_eq!((words.pidfile, words.read_only), (Some("/run/a,b".into()), true));
    assert_eq!(config(r"a b -o run=printf\040a\\nb").run, Some(r"printf a\nb".into()));
}

#[test]
fn a_remount_is_another_command() {
    let remount = |line: &str| match words(line) {
        Ok(Command::Remount { mountpoint, read_only }) => (mountpoint, read_only),
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(remount("a b -o rw,remount,ro,daemonize,pidfile=/p"), ("b".into(), true));
    assert_eq!(remount("a b -o ro,remount,rw"), ("b".into(), false));
    assert_eq!(remount("a b -o user_id=0,group_id=0,remount"), ("b".into(), false));
    assert!(error("a b -o user_id=0").contains("user_id: no such option"));
    assert!(error("a -o remount").contains("MOUNTPOINT"));
    assert!(error("a b -o remount --run true").contains("MOUNTPOINT only"));
    assert!(error("a b -o remount=ro").contains("takes no value"));
}

#[test]
fn unknown_mount_options_may_be_left_out() {
    let words = ["a", "b", "-o", "nonsense,ro,more=x"].map(str::to_owned);
    let sloppy = parse_as(&words, true);
    assert!(matches!(sloppy, Ok(Command::Serve(config)) if config == self::config("-r a b")));
    assert!(parse_as(&words, false).is_err());
    // What is known, and wrong, is an error all the same.
    for bad in ["uid=x", "uid=-1", "uid=4294967295", "gid=4294967295"] {
        assert!(parse_as(&["a", "b", "-o", bad].map(str::to_owned), true).is_err(), "{bad}");
    }
}

#[test]
fn read_only_outweighs_rw() {
    for line in ["-r -o rw a b", "-o rw -r a b", "a b -o read-only,rw", "a b -o rw,ro"] {
        assert!(config(line).read_only, "{line}");
    }
    for line in ["a b -o ro,rw", "a b -o ro -o rw", "a b"] {
        assert!(!config(line).read_only, "{line}");
    }
}

#[test]
fn a_double_dash_ends_the_options() {
    assert_eq!(config("-- -r=x --b").source, Source::Path("-r=x".into()));
}

#[test]
fn help_is_a_name_as_any_other() {
    let words = config("help --run help");
    assert_eq!((words.source, words.run), (Source::Path("help".into()), Some("help".into())));
    assert_eq!(config("a help").mountpoint, Some("help".into()));
}

#[test]
fn switches_take_no_value() {
    for switch in
        ["read-only", "growable", "kernel-cache", "direct", "daemonize", "json", "help", "version"]
    {
        let expected = format!("--{switch} takes no value");
        assert!(error(&format!("--{switch}=yes b")).contains(&expected), "{switch}");
        assert!(error(&format!("a b --{switch}= ")).contains(&expected), "{switch}");
    }
}

#[test]
fn values_may_look_like_options() {
    let words = config("a b --pidfile --direct=yes --run --x=y");
    assert_eq!(words.pidfile, Some("--direct=yes".into()));
    assert_eq!(words.run, Some("--x=y".into()));
    assert_eq!(config("a b --pidfile -- --growable").pidfile, Some("--".into()));
}

#[test]
fn paths_are_not_empty() {
    let error = |words: &[&str]| {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        parse(&words).expect_err("a path is empty").to_string()
    };
    assert!(error(&["", "b"]).contains("SOURCE is empty"));
    assert!(error(&["a", ""]).contains("MOUNTPOINT is empty"));
    assert!(error(&["a", "", "--run", "true"]).contains("MOUNTPOINT is empty"));
    assert!(error(&["a", "b", "--pidfile="]).contains("--pidfile is empty"));
    assert!(error(&["a", "b", "--pidfile", ""]).contains("--pidfile is empty"));
    assert!(error(&["a", "b", "-o", "pidfile="]).contains("--pidfile is empty"));
    assert!(error(&["--info="]).contains("SOURCE is empty"));
}

#[test]
fn sizes() {
    assert_eq!(parse_size("4096"), Some(4096));
    assert_eq!(parse_size("64M"), Some(64 << 20));
    assert_eq!(parse_size("1T"), Some(1 << 40));
    for bad in ["", "M", "-1", "+1", "1X", "9223372036854775808", "9999999T", "1.5G"] {
        assert_eq!(parse_size(bad), None, "{bad}");
    }
}

#[test]
fn errors_name_the_word_and_the_cure() {
    assert!(error("").contains("SOURCE and MOUNTPOINT"));
    assert!(error("a").contains("MOUNTPOINT is missing"));
    assert!(error("a b c").contains("not also c"));
    assert!(error("a b --io-uring maybe").contains("auto, on or off, not \"maybe\""));
    assert!(error("a b --queue-depth 0").contains("from 1 to 4096"));
    assert!(error("a b -o nonsense").contains("nonsense: no such option"));
    assert!(error("a b -o uid=x").contains("x is not a number"));
    assert!(error("a b -o uid").contains("uid=..."));
    assert!(error("a b -o ro=1").contains("takes no value"));
    assert!(error("a b --nonsense").contains("--nonsense: no such option (try"));
    assert!(error("a b --readonly").contains("did you mean --read-only?"));
    assert!(error("a b --io_uring=on").contains("did you mean --io-uring?"));
    assert!(error("a b -o allow-othr=on").contains("did you mean allow-other?"));
    assert!(error("a b -o _netdef").contains("did you mean _netdev?"));
    assert!(error("mem:lots b").contains("mem:SIZE"));
    assert!(error("ftp://x b").contains("ftp://"));
}

#[test]
fn run_may_leave_out_the_mountpoint() {
    assert_eq!(config("a --run true").mountpoint, None);
    assert!(config("a b --run true").mountpoint.is_some());
    assert!(error("a --run true --daemonize").contains("exclude"));
}

#[test]
fn info_takes_a_source() {
    let info = words("--info mem:4K --json");
    let source = Source::Memory(4096);
    assert!(matches!(info, Ok(Command::Info { source: s, json: true, .. }) if s == source));
    assert!(error("--info a b").contains("not also b"));
    assert!(error("--json a b").contains("--info"));
}

#[test]
fn list_takes_an_nbd_uri() {
    assert!(matches!(words("--list nbd://host"), Ok(Command::List { json: false, .. })));
    assert!(error("--list disk.img").contains("NBD URI"));
    assert!(error("--list nbd://host --info a").contains("exclude"));
    assert_eq!(words("--mounts --json"), Ok(Command::Mounts { json: true }));
    assert!(error("--mounts a").contains("takes no operand a"));
    assert!(error("--mounts --list nbd://host").contains("exclude"));
    assert!(error("--mounts=yes").contains("takes no value"));
    let top = |files: &[&str], json| {
        Ok(Command::Top { files: files.iter().map(PathBuf::from).collect(), json })
    };
    assert_eq!(words("--top"), top(&[], false));
    assert_eq!(words("a --top b --json"), top(&["a", "b"], true));
    assert!(error("--top --mounts").contains("exclude"));
    assert!(error("--top --info a").contains("exclude"));
    assert!(error("--top [ a ]").contains("--top takes files"));
    assert!(error("--top=a").contains("takes no value"));
}

#[test]
fn nbd_uris_are_sources() {
    let config = config("nbds://storage/vm1 b --connect-timeout 3 --tls-certificates /pki");
    assert_eq!(config.source.to_string(), "nbds://storage/vm1");
    assert_eq!(self::config("nbd://h:10809 b").words, "nbd://h:10809");
    assert_eq!(config.remote.connect_timeout, Duration::from_secs(3));
    assert!(error("nbd://storage/vm1?nonsense=1 b").contains("nonsense"));
    assert!(error("nbd://storage/vm1 b --connect-timeout 0").contains("from 1 to 604800"));
    let words = "a b -o timeout=5,reconnect-timeout=0,open-timeout=7,unflushed=8M";
    let remote = self::config(words).remote;
    assert_eq!(remote.timeout, Some(Duration::from_secs(5)));
    assert_eq!(remote.reconnect_timeout, Duration::ZERO);
    assert_eq!((remote.open_timeout, remote.unflushed), (Duration::from_secs(7), 8 << 20));
    assert_eq!(self::config("a b --timeout 0 --unflushed 0").remote.timeout, None);
    assert!(error("a b --unflushed 1M").contains("from 4M to 64G"));
    assert!(error("a b --timeout -1").contains("from 0 to 604800"));
}

#[test]
fn certificates_want_tls() {
    for line in [
        "nbd://storage/vm1 b --tls-certificates /pki",
        "nbd+unix:///?socket=s b -o tls-certificates=/pki",
        "disk.img b --tls-certificates /pki",
        "--list nbd://storage --tls-certificates /pki",
        "--info nbd://storage --tls-certificates /pki",
        "--info disk.img --tls-certificates /pki",
    ] {
        assert!(error(line).contains("nbds://"), "{line}");
    }
    assert!(words("--list nbds://storage --tls-certificates /pki").is_ok());
}

#[test]
fn truncations_are_refused_unless_they_zero() {
    assert_eq!(config("a b").truncate, Truncate::Refuse);
    assert_eq!(config("a b --truncate zero").truncate, Truncate::Zero);
    assert_eq!(config("a b -o truncate=zero --truncate=refuse").truncate, Truncate::Zero);
    assert!(error("a b --truncate cut").contains("refuse or zero, not \"cut\""));
}

#[test]
fn caches() {
    assert_eq!(config("a b").cache, CacheWish::Auto);
    assert_eq!(config("a b").read_ahead, 4 << 20);
    let words = config("a b -o cache=writeback,kernel-cache,read-ahead=64K,connections=3");
    assert_eq!(words.cache, CacheWish::Is(Cache::Writeback));
    assert_eq!((words.kernel_cache, words.read_ahead), (true, 64 << 10));
    assert_eq!(words.remote.connections, Some(3));
    assert_eq!(config("a b --read-ahead 0").read_ahead, 0);
    assert!(error("a b --cache yes").contains("writethrough or writeback, not \"yes\""));
    assert!(error("a b --read-ahead 2G").contains("from 0 to 1G"));
    assert!(error("a b --connections 0").contains("from 1 to 256"));
    assert!(error("a b --cache none --kernel-cache").contains("--kernel-cache goes with"));
    assert!(error("a b --cache writeback --truncate zero").contains("does not go with"));
}

#[test]
fn parts_of_a_disk() {
    assert_eq!(config("a b").part, None);
    assert_eq!(config("a b --partition 5").part, Some(Wanted::Partition(5)));
    assert_eq!(config("a b -o partition=2").part, Some(Wanted::Partition(2)));
    let range = |offset, size| Some(Wanted::Range { offset, size });
    assert_eq!(config("a b --offset=1M").part, range(1 << 20, None));
    assert_eq!(config("a b -o offset=0").part, range(0, None));
    assert_eq!(config("a b --size 4K").part, range(0, Some(4096)));
    assert_eq!(config("a b -o offset=512,size=1T").part, range(512, Some(1 << 40)));
    assert_eq!(config("a b -o start=512").part, range(512, None));
    for line in ["a b --partition 1 --offset 0", "a b -o partition=1 --size 1M"] {
        assert!(error(line).contains("leave out --offset and --size"), "{line}");
    }
    for number in ["0", "-1", "x", "1M", "4294967296"] {
        assert!(error(&format!("a b --partition {number}")).contains("from 1 on"), "{number}");
    }
    assert!(error("a b --offset -1").contains("--offset is a number of bytes from 0 on"));
    assert!(error("a b --size 0").contains("--size is a number of bytes from 1 on"));
    assert!(error("a b --size 1M --growable").contains("fixed size"));
    for line in ["--info a --partition 1", "--list nbd://host --offset 1"] {
        assert!(error(line).contains("go with a MOUNTPOINT"), "{line}");
    }
    assert!(error("a b -o partition").contains("partition=..."));
    assert!(error("a b -o start").contains("start=..."));
}

#[test]
fn a_server_is_a_source() {
    let server = |words: &[&str]| Source::Server(words.iter().map(|&w| w.into()).collect());
    let words = config("-r [ qemu-nbd -f qcow2 --x=y -- vm.qcow2 ] ./vm --growable");
    assert_eq!(words.source, server(&["qemu-nbd", "-f", "qcow2", "--x=y", "--", "vm.qcow2"]));
    assert_eq!(words.words, "[ qemu-nbd -f qcow2 --x=y -- vm.qcow2 ]");
    assert_eq!(words.mountpoint, Some("./vm".into()));
    assert!(words.read_only && words.growable);
    assert_eq!((words.remote.reconnect_timeout, words.remote.unflushed), (Duration::ZERO, 0));
    assert_eq!(config("--run true [ nbdkit null ]").source, server(&["nbdkit", "null"]));
    assert_eq!(config("-- [ a --b ] c").source, server(&["a", "--b"]));
    let info = self::words("--json --info [ nbdkit null ]");
    assert!(
        matches!(info, Ok(Command::Info { source, .. }) if source == server(&["nbdkit", "null"]))
    );
    let paths = config("[ a -f /dev/fd/9 ] c");
    assert!(paths.paths().any(|path| path == Path::new("/dev/fd/9")), "it is kept open");
    // Where a value stands it is one.
    assert_eq!(config("a b --pidfile [ --run ]").pidfile, Some("[".into()));
    assert_eq!(config("./[ ./]").source, Source::Path("./[".into()));
    for (line, part) in [
        ("[ a b", "the ] that ends"),
        ("[", "the ] that ends"),
        ("[ ] b", "command is missing"),
        ("[ a ]", "MOUNTPOINT is missing (SOURCE is [ a ])"),
        ("[ a ] [ b ] c", "not two servers"),
        ("b [ a ]", "before MOUNTPOINT"),
        ("[ a ] b c", "not also c"),
        ("[ a ] b --reconnect-timeout 5", "--reconnect-timeout goes with"),
        ("[ a ] b -o unflushed=8M", "--unflushed goes with"),
        ("[ a ] b --tls-certificates /pki", "nbds://"),
        ("--list [ a ]", "NBD URI"),
    ] {
        assert!(error(line).contains(part), "{line}: {}", error(line));
    }
}

#[test]
fn a_server_may_be_one_word() {
    let parse = |words: &[&str]| {
        super::parse(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>())
    };
    let config = |words: &[&str]| match parse(words) {
        Ok(Command::Serve(config)) => config,
        other => panic!("{words:?}: {other:?}"),
    };
    let server = |words: &[&str]| Source::Server(words.iter().map(|&w| w.into()).collect());
    let word = "[ qemu-nbd  -f qcow2 '/srv/my vm' ]";
    let one = config(&["--", word, "vm"]);
    assert_eq!(one.source, server(&["qemu-nbd", "-f", "qcow2", "/srv/my vm"]));
    // mount(8) is to know it again.
    assert_eq!(one.words, word);
    assert_eq!((one.remote.reconnect_timeout, one.remote.unflushed), (Duration::ZERO, 0));
    // And so it is shown, and can be remounted by, where it was several.
    let shown = config(&["[", "a", "b c", "]", "vm"]).words;
    assert_eq!(shown, "[ a 'b c' ]");
    assert_eq!(config(&[&shown, "vm"]).source, server(&["a", "b c"]));
    let remount = parse(&[&shown, "/vm", "-o", "remount,ro"]);
    assert!(matches!(remount, Ok(Command::Remount { read_only: true, .. })));
    let info = parse(&["--info", word]);
    assert!(matches!(info, Ok(Command::Info { words, .. }) if words == word));
    // Where a value stands it is one, and a file may have any name.
    assert_eq!(config(&["a", "b", "--pidfile", "[ x ]"]).pidfile, Some("[ x ]".into()));
    assert_eq!(config(&["./[ x ]", "b"]).source, Source::Path("./[ x ]".into()));
    for (words, part) in [
        (&["[ a", "b"][..], "the ] that ends"),
        (&["[ 'a ]", "b"], "a quote"),
        (&["[ ]", "b"], "command is missing"),
        (&["[ a ]"], "MOUNTPOINT is missing (SOURCE is [ a ])"),
        (&["[ a ]", "[ b ]"], "not two servers"),
        (&["b", "[ a ]"], "before MOUNTPOINT"),
        (&["[ a ]", "b", "-o", "reconnect-timeout=5"], "--reconnect-timeout goes with"),
        (&["--list", "[ a ]"], "NBD URI"),
    ] {
        let error = parse(words).expect_err("it makes no sense").to_string();
        assert!(error.contains(part), "{words:?}: {error}");
    }
}

#[test]
fn long_options_are_mount_options() {
    const NOT_WITH_A_MOUNTPOINT: [&str; 8] =
        ["--help", "--version", "--options", "--info", "--list", "--mounts", "--top", "--json"];
    for flag in Args::get_args_info().flags {
        let name = flag.long.trim_start_matches("--");
        let is_known = WITH_VALUE.contains(&name) || SWITCHES.contains(&name);
        assert_ne!(is_known, NOT_WITH_A_MOUNTPOINT.contains(&flag.long), "{name}");
    }
    // Known, and understood: what is wrong is the value, if it is one.
    for name in WITH_VALUE {
        let words = words(&format!("a b -o {name}=x"));
        let is_understood = |e: &UsageError| !e.to_string().contains("no such option");
        assert!(words.as_ref().err().is_none_or(is_understood), "{name}: {words:?}");
        assert_ne!(words, Ok(Command::Serve(config("a b"))), "{name}");
    }
    for name in SWITCHES {
        let words = words(&format!("a b -o {name},cache=writeback"));
        assert_ne!(words, Ok(Command::Serve(config("a b -o cache=writeback"))), "{name}");
    }
}

#[test]
fn help_and_version_are_printed() {
    for line in ["--help", "--version", "-h", "-V", "a b -h", "-V a"] {
        assert!(matches!(words(line), Ok(Command::Print(_))), "{line}");
    }
}

#[test]
fn help_has_all_options_in_80_columns() {
    let help = help_text();
    let long = help.lines().find(|line| line.chars().count() > 80);
    assert_eq!(long, None);
    for option in WITH_VALUE {
        assert!(help.contains(&format!("--{option} <")), "{option}: {help}");
    }
    for option in SWITCHES.into_iter().chain(["json", "help", "version"]) {
        let is = |line: &str| line.split([' ', ',']).any(|word| word == format!("--{option}"));
        assert!(help.lines().any(is), "{option}: {help}");
    }
}

#[test]
fn all_is_for_the_exports_of_a_server() {
    let all = config("--all nbd://host dir");
    assert!(all.all && !config("nbd://host dir").all);
    assert_eq!(all, config("nbd://host dir -o all"));
    assert!(config("--all --run true nbds://host").mountpoint.is_none());
    for (line, part) in [
        ("--all disk.img dir", "NBD server"),
        ("--all mem:1M dir", "NBD server"),
        ("--all [ nbdkit memory 1M ] dir", "NBD server"),
        ("--all nbd://host/vm1 dir", "leave out 'vm1'"),
        ("--all --partition 1 nbd://host dir", "--partition"),
        ("--all --offset 1M nbd://host dir", "--offset"),
        ("--all --growable nbd://host dir", "--growable"),
        ("--all --cache writeback nbd://host dir", "writeback"),
        ("--all --on-loss exit nbd://host dir", "--on-loss exit"),
        ("--all=yes nbd://host dir", "--all takes no value"),
    ] {
        let error = error(line);
        assert!(error.contains(part), "{line}: {error}");
    }
}
