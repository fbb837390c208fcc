#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two network namespaces joined by a veth pair, with two ranks of the given command in each. To be run in namespaces of
# its own (network, mount, process), with which all of this ends. Prints READY once they are joined.
set -euo pipefail
mount -t tmpfs none /run
ip netns add left
ip netns add right
ip link add veth-left netns left type veth peer name veth-right netns right
for side in left right; do
    address=$([ "$side" = left ] && echo 10.0.0.1 || echo 10.0.0.2)
    ip -n "$side" address add "$address/24" dev "veth-$side"
    ip -n "$side" link set "veth-$side" up
    ip -n "$side" link set lo up
done
ip netns exec left true
echo READY
export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 WORLD_SIZE=4
ranks=()
for rank in 0 1 2 3; do
    side=$([ "$rank" -lt 2 ] && echo left || echo right)
    RANK=$rank GLOO_SOCKET_IFNAME="veth-$side" ip netns exec "$side" "$@" &
    ranks+=($!)
done
for rank in "${ranks[@]}"; do wait "$rank"; done
