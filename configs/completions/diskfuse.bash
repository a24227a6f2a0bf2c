# Completion of diskfuse(1) for bash: /usr/share/bash-completion/completions/diskfuse

_diskfuse() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words
    # --name=value comes as three words.
    if [[ $current == = ]]; then
        current=
    elif [[ $before == = ]]; then
        before=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    COMPREPLY=()
    case $before in
    --io-uring | --allow-other) words="auto on off" ;;
    --cache) words="auto none writethrough writeback" ;;
    --truncate) words="refuse zero" ;;
    --on-loss) words="wait exit" ;;
    -o | --options) words="ro rw allow_other uid= gid= remount _netdev nofail" ;;
    --list) words="nbd:// nbds:// nbd+unix:/// nbds+unix:/// nbd+vsock:// nbds+vsock://" ;;
    --tls-certificates)
        mapfile -t COMPREPLY < <(compgen -d -- "$current")
        return
        ;;
    --run)
        mapfile -t COMPREPLY < <(compgen -c -- "$current")
        return
        ;;
    --queue-depth | --read-ahead | --connections | --connect-timeout | --open-timeout | --timeout | \
        --reconnect-timeout | --unflushed | --partition | --offset | --size)
        return
        ;;
    *)
        if [[ $current != -* ]]; then
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
        fi
        words="-r --read-only -o --options --all --io-uring --queue-depth --growable --truncate --cache --kernel-cache
            --read-ahead --direct --allow-other --daemonize --pidfile --run --tls-certificates --connections
            --connect-timeout --open-timeout --timeout --reconnect-timeout --on-loss --unflushed --partition --offset
            --size --list --info --mounts --top --json -V --version -h --help"
        ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}

complete -o filenames -o bashdefault -F _diskfuse diskfuse
